"""Stage `latents`: the same pixels through both autoencoders, and the prompts through the text encoders.

Writes a LatentCache, statistics-<px>.json (mean, std, RMS per channel), and roundtrip.png. A broken picture is named
and left out. More of them than `data.max_broken` allows are an error. rows.jsonl lists the pictures in the order of the
rows. New pictures are appended: the rows that are there keep their places, and stay held out or not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from functools import cache as lazily
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor

from dcgen_convert.core import clock, pulse
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json, replacing, write_json
from dcgen_convert.core.journal import Stage
from dcgen_convert.core.pixels import to_image
from dcgen_convert.core.progress import Bar
from dcgen_convert.data import buckets, cache, contents, decoding, images, videos
from dcgen_convert.data.ahead import ahead
from dcgen_convert.data.buckets import Span
from dcgen_convert.data.images import Picture
from dcgen_convert.data.tally import Tally
from dcgen_convert.evaluation.grids import cell, grid
from dcgen_convert.families import pixel_memory
from dcgen_convert.networks import autoencoder_files, autoencoders, pipelines
from dcgen_convert.networks.at_once import AtOnce, release
from dcgen_convert.networks.autoencoders import Codec
from dcgen_convert.planning.costs import LATENT, text_bytes
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.stages import pictures as pictures_stage
from dcgen_convert.stages import precision, source_pipeline
from dcgen_convert.stages.conditions import Conditions
from dcgen_convert.stages.grid import shown
from dcgen_convert.stages.job import Job
from dcgen_convert.stages.pictures import require_few

SHARD_ROWS = (32, 512)  # fewest and most pictures in one file
SHARD_BYTES = 256 << 20  # of one file at the most: it is put together in memory, and a kill costs it
SHARDS = 256  # files that a small data set is divided into, so that each rank gets some: ranks share whole files
ROUNDTRIP = 8  # pictures in roundtrip.png
EARLY = 256  # pictures that the scale is checked on before the others are encoded
READ_AHEAD = 16  # pictures
CHECKED = (16, 16)  # px at which the frames of a video are read to see that they can be
STATISTICS = 1024  # pictures that the scale of a channel is measured on
HELD_OUT = "held-out.json"  # rows that no training sees
LAYOUT = "layout.json"  # rows per shard: of the first pictures, and of all that are appended later


def run(job: Job, stage: Stage) -> None:
    """Encode every readable picture at every resolution of the phases that are trained on these pictures."""
    resolutions = job.resolutions
    kept = rows_before(job)
    known = set(kept)
    new = [picture for picture in pictures_stage.listed(job) if picture not in known]
    with clock.timed("check", len(new)):
        good = readable(job, new, len(kept) + len(new))
    pictures = [*kept, *arranged(job, good)]
    pictures_stage.require_two(len(pictures))
    held_out = cache.hold_out(
        [row_name(job, picture) for picture in pictures], held_before(stage, len(kept)), len(kept)
    )
    spans = spans_of(job, stage, pictures, resolutions)
    if not (stage.folder / LAYOUT).exists():
        write_json(stage.folder / LAYOUT, {"rows_per_shard": shard_rows(len(pictures), row_bytes(job))})
    write_json(stage.folder / HELD_OUT, held_out)
    images.write_index(stage.folder / images.ROWS, pictures, job.pictures_root)
    if job.recipe.latents.normalise == "channel" and job.is_aligned:
        normalise(job, pictures, spans[resolutions[0]])
    if job.is_aligned:
        precision.decide(job, stage, pictures, first_views(job, spans))
        release()
    codecs = load_codecs(job)
    target = codecs["target"]
    stage.metrics["roundtrip_psnr_db"] = roundtrip(job, stage, pictures, target, spans[resolutions[-1]])
    with job.console.progress("latents", len(pictures) * len(resolutions), "pictures") as bar:
        for resolution in resolutions:
            check_early(job, pictures, target, spans[resolution])
            with job.crew.share("latents", bar, together=False, of=job.pictures, spans=spans[resolution]):
                encode_pictures(job, pictures, codecs, spans[resolution], bar)
            check_scale(job, stage, target, resolution)
    del codecs, target
    release()  # the text encoders take their place
    encode_captions(job, stage, pictures)
    plain = all(found == buckets.whole(len(pictures), px) for px, found in spans.items())
    cache.write_index(
        stage.folder, len(pictures), rows_per_shard(job), held_out, job.latents_key, None if plain else spans
    )


def say(job: Job, text: str) -> None:
    job.console.say(f"{job.folders.latents.name}: {text}")


def rows_before(job: Job) -> list[Picture]:
    """The pictures that have rows already, in their order."""
    path = job.folders.latents / images.ROWS
    return images.read_index(path, job.pictures_root) if path.exists() else []


def held_before(stage: Stage, rows: int) -> list[int]:
    """The held-out rows of the first ``rows``."""
    path = stage.folder / HELD_OUT
    return [row for row in read_json(path) if row < rows] if path.exists() else []


def row_name(job: Job, picture: Picture) -> str:
    """A name that is the same wherever data and run lie."""
    return os.path.relpath(picture.file, job.pictures_root)


def arranged(job: Job, pictures: list[Picture]) -> list[Picture]:
    """The pictures in the order of the cache's rows: by number of references, then by shape where there are buckets."""
    if job.recipe.data.buckets:
        pictures = [pictures[i] for i in buckets.by_shape([shape_of(job, picture) for picture in pictures])]
    return sorted(pictures, key=lambda picture: len(job.references_of(picture)))


def spans_of(job: Job, stage: Stage, pictures: list[Picture], resolutions: list[int]) -> dict[int, list[Span]]:
    """For each resolution the spans of rows of one size and one number of references."""
    more = [len(job.references_of(picture)) - job.family.fewest_references for picture in pictures]
    if not job.recipe.data.buckets:
        squares = [(1, 1)] * len(pictures)
        return {px: buckets.spans(squares, [], px, more) for px in resolutions}
    shapes = [shape_of(job, picture) for picture in pictures]
    spans = {px: buckets.spans(shapes, job.buckets[px], px, more) for px in resolutions}
    for px in resolutions:
        filled = buckets.tables(spans[px]).values()
        shown = ", ".join(
            f"{parts[0].height}x{parts[0].width} {sum(len(part.rows) for part in parts)}" for parts in filled
        )
        stage.metrics[f"buckets_{px}"] = shown
        say(job, f"{px} px, pictures by height x width: {shown}")
    return spans


def stacked(job: Job, pictures: list[Picture], rows: Iterable[int], span: Span) -> Tensor:
    """Pixels of ``rows`` as the new autoencoder sees them, (B, 3, height, width); the size is that of the span."""
    return torch.stack([contents.read(pictures[row].file, [sizes_of(job, span)["target"]], job.fps)[0] for row in rows])


def views(
    job: Job, files: list[dict[str, Path]], sizes: dict[str, contents.Size], row: int
) -> dict[tuple[str, str], Tensor]:
    """(autoencoder, tensor) -> pixels of a row as the autoencoder sees them, (3, height, width).

    Args:
        files: tensor -> file, of every row. All files of a row are seen at one size.
    """
    found = {}
    for tensor, file in files[row].items():
        for name, pixels in zip(sizes, _seen(job, tensor, file, [*sizes.values()]), strict=True):
            found[name, tensor] = pixels
    return found


def _seen(job: Job, tensor: str, file: Path, sizes: list[contents.Size]) -> list[Tensor]:
    """Pixels of a file at several sizes; of a reference the video that the family makes of its first frame."""
    if tensor == "z" or not job.frames:
        return contents.read(file, sizes, job.fps)
    stills = contents.read(file, [(1, *size[1:]) for size in sizes])
    return [
        job.family.reference_video(still[None, :, 0], size[0], first=(size[0] - 1) % job.ae.time.frames + 1)[0]
        for still, size in zip(stills, sizes, strict=True)
    ]


def sizes_of(job: Job, span: Span) -> dict[str, contents.Size]:
    """(height, width) in px of the pictures of a span, of videos (frames, height, width); by autoencoder.

    The base sees them in the first phase only, at the size of the alignment: no later stage reads its latents.
    """
    sizes: dict[str, contents.Size] = {"target": (span.height, span.width)}
    if job.is_aligned and span.table.partition("-")[0] == str(job.alignment.resolution):
        sizes["base"] = job.alignment.size(span.height, span.width)
    if job.frames:
        frames = {"target": job.frames, "base": job.shown_frames}
        sizes = {name: (frames[name], *size) for name, size in sizes.items()}
    return sizes


def first_views(job: Job, spans: dict[int, list[Span]]) -> dict[str, tuple[contents.Size, list[int]]]:
    """What each autoencoder is tried on: the first pictures, at the largest size that it sees."""
    shown = {"base": spans[job.alignment.resolution][0], "target": spans[max(spans)][0]}
    most = precision.PICTURES
    return {name: (sizes_of(job, span)[name], list(span.rows[:most])) for name, span in shown.items()}


def shape_of(job: Job, picture: Picture) -> tuple[int, int]:
    """(width, height) in px of a picture or a video as it is shown."""
    return contents.size_of(picture.file, moving=bool(job.frames))


def looked_at(spans: list[Span], count: int) -> list[tuple[Span, list[int]]]:
    """``count`` rows to look at, taken from each span in turn; by span."""
    chosen = buckets.first_of_each([span.rows for span in spans], count)
    return [(next(span for span in spans if rows[0] in span.rows), rows) for rows in chosen]


def normalise(job: Job, pictures: list[Picture], spans: list[Span]) -> None:
    """Write the autoencoder with the scale of every latent channel changed: on these pictures its RMS is then 1.

    Up to STATISTICS pictures are measured. The channels are not shifted: decoders pad their latent with zeros, so zero
    must stay zero.
    """
    if (job.target / "config.json").exists():
        return
    codec = autoencoders.load(job.ae.folder, device=pipelines.device(), scale=1.0, console=job.console)
    rms = powers(job, pictures, codec, spans, STATISTICS).sqrt()
    if not rms.min() > 0:
        raise InputError(
            f"latent channel {int(rms.argmin())} is zero on every picture", "set latents.normalise to none"
        )
    autoencoder_files.write_rewritten(job.ae.folder, job.target, rms=rms)
    say(job, f"channels divided by their RMS, {rms.min():.3g} to {rms.max():.3g}, inside the autoencoder's weights")


def at_once(job: Job, span: Span) -> int:
    """Pictures of the span's size that are read and encoded together."""
    return pixel_memory.together(job.recipe.latents.batch, max(1, job.frames) * span.height * span.width)


def powers(job: Job, pictures: list[Picture], codec: Codec, spans: list[Span], count: int) -> Tensor:
    """Mean square of every latent channel over up to ``count`` pictures, (C,) float64."""
    square, samples, batch = torch.zeros(codec.channels, dtype=torch.float64), 0, at_once(job, spans[0])
    for span, rows in looked_at(spans, count):
        for start in range(0, len(rows), batch):
            z = codec.encode(stacked(job, pictures, rows[start : start + batch], span))
            z = z.double().movedim(1, 0).flatten(1)  # (C, samples)
            square, samples = square + z.square().sum(1), samples + z.shape[1]
    return square / samples


def check_early(job: Job, pictures: list[Picture], codec: Codec, spans: list[Span]) -> None:
    """Measure the scale on the first pictures, so that a wrong one does not cost the encoding of them all.

    Where the pictures are few, or were begun before, `check_scale` comes soon enough.
    """
    begun = (job.folders.latents / cache.shard_name(f"target-{spans[0].table}", 0)).exists()
    if begun or spans[-1].stop <= 2 * EARLY:
        return
    rms = powers(job, pictures, codec, spans, EARLY).mean().sqrt().item()
    require_scale(job, codec, codec.scaling / rms, f" on the first {EARLY} pictures")


def load_codecs(job: Job) -> dict[str, Codec]:
    """Both autoencoders: "base" and "target"."""
    return {name: precision.load(job, name) for name in precision.NAMES}


def encode_part(job: Job, bar: Bar, spans: list[list[Any]]) -> None:
    """What the other ranks do of `encode_pictures`; ``spans`` came as JSON."""
    pictures = images.read_index(job.folders.latents / images.ROWS, job.pictures_root)
    encode_pictures(job, pictures, load_codecs(job), [Span(*span) for span in spans], bar)


def readable(job: Job, pictures: list[Picture], count: int) -> list[Picture]:
    """The pictures that can be read. InputError when too many of all ``count`` cannot (see `data.max_broken`).

    Says what had to be done about some of the others.
    """
    side = job.resolutions[-1]
    broken: list[str] = []
    left_out, seen, kept = Tally(), Tally(), []
    files = [[*job.files_of(picture).values()] for picture in pictures]
    check = partial(decoded, job.frames, job.fps)
    for picture, (size, found, problem) in zip(pictures, ahead(files, check, depth=READ_AHEAD), strict=True):
        if problem:
            job.console.warn(problem)
            broken.append(problem)
            left_out.add("because they cannot be read", picture.file.name)
            continue
        height, width = buckets.nearest(job.buckets[side], *size) if job.buckets else (side, side)
        enlarged = [f"smaller than {side} px, enlarged"] if size[0] < width or size[1] < height else []
        for note in (*found, *enlarged):
            seen.add(note, picture.file.name)
        kept.append(picture)
    require_few(job, broken, count)
    if broken:
        say(job, f"{len(kept)} pictures taken, {len(broken)} left out {left_out.reasons()}")
    for note in seen.counts:
        say(job, f"pictures {note} ({seen.of(note)})")
    return kept


def decoded(frames: int, fps: float, files: list[Path]) -> tuple[tuple[int, int], list[str], str]:
    """(width, height), what had to be done about a picture, and why it cannot be read; the last is mostly empty.

    Args:
        frames: that a video must have; 0: it is a picture. fps: frames a second of the videos that the model draws.
        files: the picture, and its references if there are any.
    """
    pulse.bump()
    try:
        if frames:
            contents.read(files[0], [(frames, *CHECKED)], fps)
            return videos.shape(files[0])[:2], [], ""
        found = [decoding.decode(file) for file in files]
    except InputError as error:
        return (0, 0), [], error.message
    image, notes = found[0]
    return image.size, notes, ""


def roundtrip(job: Job, stage: Stage, pictures: list[Picture], codec: Codec, spans: list[Span]) -> float:
    """Draw a few pictures beside their reconstructions; PSNR in dB over them (peak-to-peak 2)."""
    columns: dict[str, list[Image]] = {"picture": [], "round trip": []}
    captions, square, count = [], 0.0, 0
    for span, rows in looked_at(spans, ROUNDTRIP):
        for row in rows:
            pixels = stacked(job, pictures, [row], span)
            again = codec.decode(codec.encode(pixels))
            pixels = pixels[:, :, : again.shape[2]]  # of a video the last frames are not given back
            columns["picture"].append(cell(to_image(shown(job.family, pixels[0]))))
            columns["round trip"].append(cell(to_image(shown(job.family, again[0]))))
            captions.append(pictures[row].caption)
            square, count = square + (again - pixels).square().sum(dtype=torch.float64).item(), count + pixels.numel()
    with replacing(stage.folder / "roundtrip.png") as temporary:
        grid(columns, captions).save(temporary, format="PNG")
    psnr = round(-10 * math.log10(max(square / count / 4, 1e-10)), 2)
    say(job, f"autoencoder round trip {psnr} dB on {len(captions)} pictures (the ceiling of any converted model)")
    return psnr


def shard_rows(count: int, each: float) -> int:
    """Rows per shard for ``count`` pictures. It does not depend on the number of ranks, which may change in a run.

    Args:
        each: bytes of one row of the largest table.
    """
    fewest, most = SHARD_ROWS
    return max(1, min(most, max(fewest, math.ceil(count / SHARDS)), int(SHARD_BYTES // each)))


def row_bytes(job: Job) -> float:
    """Bytes of one row of the largest table: base, target or text, at the largest size of these pictures."""
    sizes = shapes_of(job.recipe, job.identity)
    target = sizes.latent_numbers(job.resolutions[-1:], aligned=False)
    base = sizes.latent_numbers((), job.is_aligned)
    return max(LATENT * max(target, base), text_bytes(job.recipe, sizes))


def rows_per_shard(job: Job) -> int:
    return int(read_json(job.folders.latents / LAYOUT)["rows_per_shard"])


def own_shards(job: Job, tables: Iterable[list[range]], size: int) -> Iterator[tuple[int, int, list[int]]]:
    """(table, number in the table, rows) of the shards that this rank makes: every `world`-th shard of all.

    Args:
        tables: the rows of each table, in order.
        size: rows per shard.
    """

    def shards() -> Iterator[tuple[int, int, list[int]]]:
        for table, parts in enumerate(tables):
            rows = chain(*parts)
            for number, shard in enumerate(iter(lambda: list(islice(rows, size)), [])):  # noqa: B023  rows are used up before the next table
                yield table, number, shard

    return islice(shards(), job.crew.rank, None, job.crew.world)


def encode_pictures(job: Job, pictures: list[Picture], codecs: dict[str, Codec], spans: list[Span], bar: Bar) -> None:
    """Write this rank\'s shards target-TABLE, and base-TABLE where it is needed; rows that are there are kept."""
    folder, tables = job.folders.latents, list(buckets.tables(spans).values())
    files = [job.files_of(picture) for picture in pictures]
    for table, number, rows in own_shards(job, [[span.rows for span in part] for part in tables], rows_per_shard(job)):
        span = tables[table][0]
        sizes, batch = sizes_of(job, span), at_once(job, span)
        parts = {name: cache.shard_before(folder, f"{name}-{span.table}", number) for name in sizes}
        done = min(cache.rows_of(part) for part in parts.values())
        bar.advance(done)
        if done == len(rows):
            continue
        kinds = [(name, tensor) for name in sizes for tensor in files[rows[0]]]
        encoded: dict[tuple[str, str], list[Tensor]] = {
            (name, tensor): [parts[name][tensor][:done]] if done else [] for name, tensor in kinds
        }
        read = partial(views, job, files, sizes)
        reading = ahead(rows[done:], read, depth=2 * batch)  # threads decode while the device encodes
        while True:
            with clock.timed("read", min(batch, len(rows) - done)):
                part = list(islice(reading, batch))
            if not part:
                break
            pixels = {kind: torch.stack([view[kind] for view in part]) for kind in kinds}
            with clock.timed("encode", sum(seen[:, 0].numel() for seen in pixels.values())):
                for (name, tensor), seen in pixels.items():
                    encoded[name, tensor].append(codecs[name].encode(seen))
            bar.advance(len(part))
        with clock.timed("write", len(rows)):
            for name in sizes:
                tensors = {tensor: torch.cat(encoded[name, tensor]) for tensor in files[rows[0]]}
                cache.write_shard(folder, f"{name}-{span.table}", number, tensors)


def check_scale(job: Job, stage: Stage, codec: Codec, resolution: int) -> None:
    """Measure the latents; InputError when 1/RMS disagrees with the scaling factor by more than the tolerance."""
    total, square = torch.zeros(2, codec.channels, dtype=torch.float64).unbind()
    count = 0
    for path in sorted(stage.folder.glob(f"target-{resolution}-*.safetensors")):
        z = load_file(path)["z"].double().movedim(1, 0).flatten(1)  # (C, samples)
        total, square, count = total + z.sum(1), square + z.square().sum(1), count + z.shape[1]
    mean, power = total / count, square / count
    rms = power.mean().sqrt().item()
    scale = codec.scaling
    measured = scale / rms
    write_json(
        stage.folder / f"statistics-{resolution}.json",
        {
            "scaling_factor": scale,
            "measured_factor": measured,
            "rms": rms,
            "mean": mean.tolist(),
            "std": (power - mean.square()).clamp_min(0).sqrt().tolist(),
            "rms_per_channel": power.sqrt().tolist(),
        },
    )
    stage.metrics[f"latent_rms_{resolution}"] = round(rms, 4)
    say(job, f"{resolution} px, scaling factor {scale:.4g} in the config, {measured:.4g} measured (1/RMS)")
    require_scale(job, codec, measured)


def require_scale(job: Job, codec: Codec, measured: float, where: str = "") -> None:
    """InputError when the measured factor disagrees with the scaling factor, and the recipe states none."""
    scale, tolerance = codec.scaling, job.recipe.latents.scale_tolerance
    if abs(measured / scale - 1) > tolerance and job.recipe.latents.scale_override is None:
        if isinstance(codec.scale, Tensor):
            raise InputError(
                f"the RMS of the latents is {1 / measured:.4g}{where}. By the mean and the standard deviation that the "
                f"autoencoder holds of each channel it would be 1, and {tolerance:.0%} are tolerated",
                f"are these its weights? --set latents.scale_tolerance={math.ceil(20 * abs(measured - 1)) / 20:g} "
                "accepts latents of this size",
            )
        raise InputError(
            f"the autoencoder's scaling factor {scale:.4g} disagrees with the measured {measured:.4g} (1/RMS)"
            f"{where} beyond {tolerance:.0%}",
            f"--set latents.scale_override={measured:.4f} uses the measured one, --set "
            f"latents.scale_override={scale:.4f} insists",
        )


def encode_captions(job: Job, stage: Stage, pictures: list[Picture]) -> None:
    """Write captions.safetensors, the tables "text" (unless the recipe encodes on the fly) and "null".

    "null" has one row: the condition of the empty prompt. It has none where the text encoder sees the references.
    """
    cache.write_captions(stage.folder, (picture.caption for picture in pictures))
    if job.recipe.latents.text == "cache":
        with (
            job.console.progress("text embeddings", len(pictures), "captions") as bar,
            job.crew.share("captions", bar, together=False, of=job.pictures),
        ):
            caption_part(job, bar)
    encoders = partial(source_pipeline.text_encoders, job.source, job.dtype)
    _empty_prompt(job, job.conditions(encoders, job.resolutions[-1]))


def caption_part(job: Job, bar: Bar) -> None:
    """Write this rank's shards of the table "text"; rows that are already there are kept. Rank 0 writes "null" too."""
    folder, batch = job.folders.latents, job.recipe.latents.batch
    count, encoding = len(cache.Captions(folder)), AtOnce(f"{folder.name}: text encoding", job.console.warn)
    encoders = lazily(partial(source_pipeline.text_encoders, job.source, job.dtype))
    conditions = job.conditions(encoders, job.resolutions[-1])
    for _, number, rows in own_shards(job, [[range(count)]], rows_per_shard(job)):
        before = cache.shard_before(folder, "text", number)
        done = cache.rows_of(before)
        bar.advance(done)
        if done == len(rows):
            continue
        parts = [before] if done else []
        encoders()
        with clock.timed("encode captions", len(rows) - done):
            for part in encoding.parts(rows[done:], conditions.of, batch):
                parts.append(part)
                bar.advance(cache.rows_of(part))
        cache.write_shard(folder, "text", number, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    if job.crew.rank == 0:
        _empty_prompt(job, conditions)  # now, while the encoders are loaded


def _empty_prompt(job: Job, conditions: Conditions) -> None:
    """Write the table "null", if it is not there."""
    if not (job.folders.latents / cache.shard_name("null", 0)).exists():
        cache.write_shard(job.folders.latents, "null", 0, conditions.null())
