"""Stage `latents`: the same pixels through both autoencoders, and the prompts through the text encoders.

Writes a LatentCache, statistics-<px>.json (mean, std, RMS per channel), and roundtrip.png. A broken picture is named
and left out. More of them than `data.max_broken` allows are an error. `latent_rows` says which picture is which row,
and which rows the base's autoencoder encodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
from dcgen_convert.stages import latent_rows, precision, source_pipeline
from dcgen_convert.stages import pictures as pictures_stage
from dcgen_convert.stages.conditions import Conditions
from dcgen_convert.stages.grid import shown
from dcgen_convert.stages.job import Job
from dcgen_convert.stages.latent_rows import say, sizes_of, tables_of
from dcgen_convert.stages.pictures import require_few

SHARD_ROWS = (32, 512)  # fewest and most pictures in one file
SHARD_BYTES = 256 << 20  # of one file at the most: it is put together in memory, and a kill costs it
SHARDS = 256  # files that a small data set is divided into, so that each rank gets some: ranks share whole files
ROUNDTRIP = 8  # pictures in roundtrip.png
EARLY = 256  # pictures that the scale is checked on before the others are encoded
READ_AHEAD = 16  # pictures
CHECKED = (16, 16)  # px at which the frames of a video are read to see that they can be
STATISTICS = 1024  # pictures that the scale of a channel is measured on
ENCODING = {"target": "encode", "base": "encode for the base"}  # kinds of work, by autoencoder
LAYOUT = "layout.json"  # rows per shard: of the first pictures, and of all that are appended later


def run(job: Job, stage: Stage) -> None:
    """Encode every readable picture at every resolution of the phases that are trained on these pictures."""
    resolutions = job.resolutions
    kept, paired = latent_rows.rows_before(job), latent_rows.paired_before(job)
    known = set(kept)
    new = [picture for picture in pictures_stage.listed(job) if picture not in known]
    with clock.timed("check", len(new)):
        good = readable(job, new, len(kept) + len(new))
    pictures = [*kept, *latent_rows.arranged(job, good)]
    pictures_stage.require_two(len(pictures))
    held_out = cache.hold_out(
        [latent_rows.row_name(job, picture) for picture in pictures],
        latent_rows.held_before(stage, len(kept)),
        len(kept),
    )
    spans = latent_rows.spans_of(job, stage, pictures, resolutions)
    if job.is_aligned:
        first = spans[job.alignment.resolution]
        paired = latent_rows.paired_of(job, pictures, held_out, first, paired, len(kept))
    if not (stage.folder / LAYOUT).exists():
        write_json(stage.folder / LAYOUT, {"rows_per_shard": shard_rows(len(pictures), row_bytes(job))})
    write_json(stage.folder / latent_rows.HELD_OUT, held_out)
    if not kept:  # the list of rows is lost, and with it which rows the shards of the base hold
        for shard in stage.folder.glob("base-*.safetensors"):
            shard.unlink()
    latent_rows.write_rows(job, pictures, paired)
    if job.recipe.latents.normalise == "channel" and job.is_aligned:
        normalise(job, pictures, spans[resolutions[0]])
    if job.is_aligned:
        precision.decide(job, stage, pictures, latent_rows.first_views(job, spans))
        release()
    codecs = load_codecs(job)
    target = codecs["target"]
    stage.metrics["roundtrip_psnr_db"] = roundtrip(job, stage, pictures, target, spans[resolutions[-1]])
    total = len(pictures) * len(resolutions) + (len(paired) if job.is_aligned else 0)
    with job.console.progress("latents", total, "pictures") as bar:
        for resolution in resolutions:
            check_early(job, pictures, target, spans[resolution])
            with job.crew.share("latents", bar, together=False, of=job.pictures, spans=spans[resolution]):
                encode_pictures(job, pictures, codecs, spans[resolution], paired, bar)
            check_scale(job, stage, target, resolution)
    del codecs, target
    release()  # the text encoders take their place
    encode_captions(job, stage, pictures)
    plain = all(found == buckets.whole(len(pictures), px) for px, found in spans.items())
    cache.write_index(
        stage.folder,
        len(pictures),
        rows_per_shard(job),
        held_out,
        job.latents_key,
        None if plain else spans,
        paired if job.is_aligned and len(paired) < len(pictures) else None,
    )


def stacked(job: Job, pictures: list[Picture], numbers: Iterable[int], span: Span) -> Tensor:
    """Pixels of rows as the new autoencoder sees them, (B, 3, height, width); the size is that of the span."""
    size = sizes_of(job, span)["target"]
    return torch.stack([contents.read(pictures[row].file, [size], job.fps)[0] for row in numbers])


def views(job: Job, files: list[dict[str, Path]], size: contents.Size, row: int) -> dict[str, Tensor]:
    """Tensor -> pixels of a row at ``size``, (3, height, width).

    Args:
        files: tensor -> file, of every row. All files of a row are seen at one size.
    """
    return {tensor: _seen(job, tensor, file, size) for tensor, file in files[row].items()}


def _seen(job: Job, tensor: str, file: Path, size: contents.Size) -> Tensor:
    """Pixels of a file; of a reference the video that the family makes of its first frame."""
    if tensor == "z" or not job.frames:
        return contents.read(file, [size], job.fps)[0]
    still = contents.read(file, [(1, *size[1:])])[0]
    return job.family.reference_video(still[None, :, 0], size[0], first=(size[0] - 1) % job.ae.time.frames + 1)[0]


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
    own = [Span(*span) for span in spans]
    encode_pictures(job, pictures, load_codecs(job), own, latent_rows.paired_before(job), bar)


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


def own_shards(job: Job, tables: Iterable[Sequence[Sequence[int]]], size: int) -> Iterator[tuple[int, int, list[int]]]:
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


def encode_pictures(
    job: Job,
    pictures: list[Picture],
    codecs: dict[str, Codec],
    spans: list[Span],
    paired: list[int],
    bar: Bar,
) -> None:
    """Write this rank's shards target-TABLE, and base-TABLE of the ``paired`` rows; rows that are there are kept."""
    folder, tables = job.folders.latents, tables_of(job, spans, paired)
    files = [job.files_of(picture) for picture in pictures]
    for place, number, shard in own_shards(job, [parts for _, _, parts in tables], rows_per_shard(job)):
        name, span, _ = tables[place]
        table, batch, codec = f"{name}-{span.table}", at_once(job, span), codecs[name]
        before = cache.shard_before(folder, table, number)
        done = cache.rows_of(before)
        bar.advance(done)
        if done == len(shard):
            continue
        encoded: dict[str, list[Tensor]] = {tensor: [before[tensor]] if done else [] for tensor in files[shard[0]]}
        read = partial(views, job, files, sizes_of(job, span)[name])
        reading = ahead(shard[done:], read, depth=2 * batch)  # threads decode while the device encodes
        while True:
            with clock.timed("read", min(batch, len(shard) - done)):
                part = list(islice(reading, batch))
            if not part:
                break
            pixels = {tensor: torch.stack([view[tensor] for view in part]) for tensor in encoded}
            with clock.timed(ENCODING[name], sum(seen[:, 0].numel() for seen in pixels.values())):
                for tensor, seen in pixels.items():
                    encoded[tensor].append(codec.encode(seen))
            bar.advance(len(part))
        with clock.timed("write", len(shard)):
            cache.write_shard(folder, table, number, {tensor: torch.cat(found) for tensor, found in encoded.items()})


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
