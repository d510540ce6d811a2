"""Stage `latents`: the same pixels through both autoencoders, and the prompts through the text encoders.

Writes a LatentCache, statistics-<px>.json (mean, std, RMS per channel), and roundtrip.png. A broken picture is reported
by name and left out, up to `data.max_broken` of them. rows.jsonl lists the pictures in the order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice

import torch
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import replacing, write_json
from dcgen_convert.core.journal import Stage
from dcgen_convert.data import buckets, cache, images
from dcgen_convert.data.buckets import Span
from dcgen_convert.data.images import Picture
from dcgen_convert.evaluate.grids import grid
from dcgen_convert.networks import autoencoder_files, autoencoders, pipelines
from dcgen_convert.networks.autoencoders import Codec

SHARD_ROWS = (32, 512)  # fewest and most pictures in one file
SHARDS = 256  # files that small data sets are cut into: what the ranks share is whole files
ROUNDTRIP = 8  # pictures
STATISTICS = 1024  # pictures that the scale of a channel is taken from
ROWS = "rows.jsonl"


def run(job, stage: Stage) -> None:
    """Encode every readable picture at every resolution of the recipe's phases."""
    every = images.read_folder(job.folder("data") / images.INDEX)
    resolutions = sorted({phase.resolution for phase in job.recipe.adapt.phases})
    pictures, spans = arranged(job, stage, readable(job, every), resolutions)
    images.write_index(stage.folder, pictures, ROWS)
    if job.recipe.latents.normalise == "channel":
        normalise(job, pictures, spans[resolutions[0]])
    codecs = load_codecs(job)
    target = codecs["target"]
    stage.metrics["roundtrip_psnr_db"] = roundtrip(job, stage, pictures, target, spans[resolutions[-1]])
    with job.console.progress("latents", len(pictures) * len(resolutions), "pictures") as bar:
        for resolution in resolutions:
            with job.crew.share("latents", bar, together=False, spans=spans[resolution]):
                encode_pictures(job, pictures, codecs, spans[resolution], bar)
            check_scale(job, stage, target, resolution)
    encode_captions(job, stage, pictures)
    bucketed = spans if job.recipe.data.buckets else None
    cache.write_index(stage.folder, len(pictures), shard_rows(len(pictures)), job.latents_key, bucketed)


def arranged(
    job, stage: Stage, pictures: list[Picture], resolutions: list[int]
) -> tuple[list[Picture], dict[int, list[Span]]]:
    """Pictures in the order of the cache's rows, and the spans of rows of one size by resolution."""
    count = len(pictures)
    if not job.recipe.data.buckets:
        return pictures, {px: buckets.whole(count, px) for px in resolutions}
    shapes = [images.size_of(picture.file) for picture in pictures]
    order = buckets.by_shape(shapes, cache.held_out(count))
    pictures, shapes = [pictures[i] for i in order], [shapes[i] for i in order]
    spans = {px: buckets.spans(shapes, job.buckets[px], px) for px in resolutions}
    for px in resolutions:
        filled = buckets.tables(spans[px]).values()
        shown = ", ".join(
            f"{parts[0].height}x{parts[0].width} {sum(len(part.rows) for part in parts)}" for parts in filled
        )
        stage.metrics[f"buckets_{px}"] = shown
        job.console.say(f"latents: {px} px, pictures by height x width: {shown}")
    return pictures, spans


def stacked(pictures: list[Picture], rows: Iterable[int], span: Span) -> Tensor:
    """Pixels of ``rows``, (B, 3, height, width) of the span."""
    return torch.stack([images.read_pixels(pictures[row].file, span.height, span.width) for row in rows])


def looked_at(spans: list[Span], count: int) -> list[tuple[Span, list[int]]]:
    """``count`` rows, of each span in turn."""
    chosen = buckets.first_of_each([span.rows for span in spans], count)
    return [(next(span for span in spans if rows[0] in span.rows), rows) for rows in chosen]


def normalise(job, pictures: list[Picture], spans: list[Span]) -> None:
    """Write the autoencoder whose latent channels have an RMS of one on (up to STATISTICS of) these pictures.

    No shift: decoders pad their latent with zeros, so that zero has to stay zero.
    """
    if (job.target / "config.json").exists():
        return
    codec = autoencoders.load(job.ae.folder, device=pipelines.device(), scale=1.0)
    square, count = torch.zeros(codec.channels, dtype=torch.float64), 0
    batch = job.recipe.latents.batch
    for span, rows in looked_at(spans, STATISTICS):
        for start in range(0, len(rows), batch):
            z = codec.encode(stacked(pictures, rows[start : start + batch], span)).cpu()
            z = z.double().movedim(1, 0).flatten(1)  # (C, samples)
            square, count = square + z.square().sum(1), count + z.shape[1]
    rms = (square / count).sqrt()
    if not rms.min() > 0:
        raise InputError(
            f"latent channel {int(rms.argmin())} is zero on every picture", "set latents.normalise to none"
        )
    autoencoder_files.write_rewritten(job.ae.folder, job.target, rms=rms)
    job.console.say(
        f"latents: channels divided by their RMS, {rms.min():.3g} to {rms.max():.3g}, inside the autoencoder's weights"
    )


def load_codecs(job) -> dict[str, Codec]:
    """Both autoencoders: "base" and "target"."""
    base = autoencoders.load(job.source.vae, device=pipelines.device())
    target = autoencoders.load(job.target, device=pipelines.device(), scale=job.recipe.latents.scale_override)
    return {"base": base, "target": target}


def encode_share(job, bar, spans: list[list]) -> None:
    """Another rank's part of `encode_pictures`; ``spans`` came as JSON."""
    pictures = images.read_folder(job.folder("latents") / ROWS)
    encode_pictures(job, pictures, load_codecs(job), [Span(*span) for span in spans], bar)


def readable(job, pictures: list[Picture]) -> list[Picture]:
    """The pictures that can be read; InputError when more than the tolerated fraction cannot."""
    broken: dict[str, str] = {}
    for picture in pictures:
        try:
            images.read_pixels(picture.file, 8)
        except InputError as error:
            broken[str(picture.file)] = error.message
    for message in broken.values():
        job.console.warn(message)
    limit = math.floor(job.recipe.data.max_broken * len(pictures))
    if len(broken) > limit:
        raise InputError(
            f"{len(broken)} of {len(pictures)} pictures cannot be read, {limit} are tolerated; first "
            f"{next(iter(broken))}",
            "repair them, or raise data.max_broken",
        )
    return [picture for picture in pictures if str(picture.file) not in broken]


def roundtrip(job, stage: Stage, pictures: list[Picture], codec: Codec, spans: list[Span]) -> float:
    """Original beside reconstruction for a few pictures; PSNR in dB over them (peak-to-peak 2)."""
    columns: dict[str, list] = {"picture": [], "round trip": []}
    captions, square, count = [], 0.0, 0
    for span, rows in looked_at(spans, ROUNDTRIP):
        pixels = stacked(pictures, rows, span)
        again = codec.decode(codec.encode(pixels)).cpu()
        for column, part in zip(columns.values(), (pixels, again), strict=True):
            column += map(images.to_image, part)
        captions += [pictures[row].caption for row in rows]
        square, count = square + (again - pixels).square().sum(dtype=torch.float64).item(), count + pixels.numel()
    with replacing(stage.folder / "roundtrip.png") as temporary:
        grid(columns, captions).save(temporary, format="PNG")
    psnr = round(-10 * math.log10(max(square / count / 4, 1e-10)), 2)
    job.console.say(
        f"latents: autoencoder round trip {psnr} dB on {len(captions)} pictures (the ceiling of any converted model)"
    )
    return psnr


def shard_rows(count: int) -> int:
    """Rows per shard for ``count`` pictures, whatever the number of ranks: a run may go on with another."""
    fewest, most = SHARD_ROWS
    return min(most, max(fewest, math.ceil(count / SHARDS)))


def own_shards(job, tables: Iterable[list[range]], count: int) -> Iterator[tuple[int, int, list[int]]]:
    """(table, number in the table, rows) of the shards that this rank makes: every `world`-th of all.

    Args:
        tables: the rows of each table, in order.
        count: rows of the cache.
    """
    size = shard_rows(count)

    def shards() -> Iterator[tuple[int, int, list[int]]]:
        for table, parts in enumerate(tables):
            rows = chain(*parts)
            for number, shard in enumerate(iter(lambda: list(islice(rows, size)), [])):  # noqa: B023  used up here
                yield table, number, shard

    return islice(shards(), job.crew.rank, None, job.crew.world)


def encode_pictures(job, pictures: list[Picture], codecs: dict[str, Codec], spans: list[Span], bar) -> None:
    """This rank's shards base-TABLE and target-TABLE; a shard that is already there is kept."""
    folder, batch, tables = job.folder("latents"), job.recipe.latents.batch, list(buckets.tables(spans).values())
    for table, number, rows in own_shards(job, [[span.rows for span in part] for part in tables], len(pictures)):
        span = tables[table][0]
        if all((folder / cache.shard_name(f"{name}-{span.table}", number)).exists() for name in codecs):
            bar.advance(len(rows))
            continue
        parts: dict[str, list[Tensor]] = {name: [] for name in codecs}
        for at in range(0, len(rows), batch):
            pixels = stacked(pictures, rows[at : at + batch], span)
            for name, codec in codecs.items():
                parts[name].append(codec.encode(pixels).cpu())
            bar.advance(len(pixels))
        for name, tensors in parts.items():
            cache.write_shard(folder, f"{name}-{span.table}", number, {"z": torch.cat(tensors)})


def check_scale(job, stage: Stage, codec: Codec, resolution: int) -> None:
    """Measure the latents; InputError when 1/RMS disagrees with the scaling factor by more than the tolerance."""
    total, square, count = (
        torch.zeros(codec.channels, dtype=torch.float64),
        torch.zeros(codec.channels, dtype=torch.float64),
        0,
    )
    for path in sorted(stage.folder.glob(f"target-{resolution}-*.safetensors")):
        from safetensors.torch import load_file

        z = load_file(path)["z"].double().movedim(1, 0).flatten(1)  # (C, samples)
        total, square, count = total + z.sum(1), square + z.square().sum(1), count + z.shape[1]
    mean, power = total / count, square / count
    rms = power.mean().sqrt().item()
    measured = codec.scale / rms
    write_json(
        stage.folder / f"statistics-{resolution}.json",
        {
            "scaling_factor": codec.scale,
            "measured_factor": measured,
            "rms": rms,
            "mean": mean.tolist(),
            "std": (power - mean.square()).clamp_min(0).sqrt().tolist(),
            "rms_per_channel": power.sqrt().tolist(),
        },
    )
    stage.metrics[f"latent_rms_{resolution}"] = round(rms, 4)
    job.console.say(
        f"latents: {resolution} px, scaling factor {codec.scale:.4g} in the config, {measured:.4g} measured (1/RMS)"
    )
    tolerance = job.recipe.latents.scale_tolerance
    if abs(measured / codec.scale - 1) > tolerance and job.recipe.latents.scale_override is None:
        raise InputError(
            f"the autoencoder's scaling factor {codec.scale:.4g} disagrees with the measured {measured:.4g} (1/RMS) "
            f"beyond {tolerance:.0%}",
            f"--set latents.scale_override={measured:.4f} uses the measured one, --set "
            f"latents.scale_override={codec.scale:.4f} insists",
        )


def encode_captions(job, stage: Stage, pictures: list[Picture]) -> None:
    """captions.safetensors, shards text (unless the recipe encodes on the fly), and null with the condition of the
    empty prompt.
    """
    cache.write_captions(stage.folder, (picture.caption for picture in pictures))
    if (stage.folder / cache.shard_name("null", 0)).exists():
        return
    cached = len(pictures) if job.recipe.latents.text == "cache" else 0
    encoders = pipelines.load_text_encoders(job.source, job.dtype)
    if cached:
        with (
            job.console.progress("text embeddings", cached, "captions") as bar,
            job.crew.share("captions", bar, together=False),
        ):
            caption_share(job, bar, encoders)
    cache.write_shard(stage.folder, "null", 0, pipelines.encode_text(job.family, encoders, [""], job.text_length))


def caption_share(job, bar, encoders=None) -> None:
    """This rank's shards text; a shard that is already there is kept."""
    folder, batch = job.folder("latents"), job.recipe.latents.batch
    captions = cache.Captions(folder)
    for _, number, rows in own_shards(job, [[range(len(captions))]], len(captions)):
        texts = captions.read(rows)
        if (folder / cache.shard_name("text", number)).exists():
            bar.advance(len(texts))
            continue
        encoders = encoders or pipelines.load_text_encoders(job.source, job.dtype)
        parts = []
        for at in range(0, len(texts), batch):
            parts.append(pipelines.encode_text(job.family, encoders, texts[at : at + batch], job.text_length))
            bar.advance(len(texts[at : at + batch]))
        cache.write_shard(folder, "text", number, {key: torch.cat([part[key] for part in parts]) for key in parts[0]})
