"""Disk and downloads of a recipe, from sizes. Each number comes with its basis."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from dcgen_convert.core import names
from dcgen_convert.families import catalog
from dcgen_convert.networks import autoencoder_files
from dcgen_convert.planning import needs
from dcgen_convert.planning.shapes import Shapes
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.paired import enough
from dcgen_convert.recipe.schema import Recipe

PNG_BYTES_PER_PIXEL = 1.6  # photographs; drawn pictures compress better
BF16 = 2
LATENT = 4  # bytes of a number of a latent: it is kept in float32, whatever the autoencoder works in
QUANTISED_BYTES = 0.65
"""Bytes per weight of a W4A4 linear: 4 bits, one FP8 scale per 16, and a rank-32 branch on widths near 3072."""


def downloads(recipe: Recipe, sizes: Shapes) -> list[dict]:
    """What must come from the hub: repository, bytes (from parameter counts at bf16), gated, already cached."""
    found = []
    source, entry = sizes.source, sizes.source.entry
    if source.hub_id:
        size = BF16 * (sizes.networks * sizes.base.parameters + sizes.companions)
        found.append(_download("source", source.hub_id, size, entry.gated if entry else None))
    base_repo = _base_repo(source)
    if base_repo:
        found.append(_download("base", base_repo, None, None))
    ae = catalog.find_autoencoder(recipe.ae)
    if ae is not None and ae.repo and not ae.given:
        found.append(_download("autoencoder", ae.repo, BF16 * ae.parameters, False))
    elif ae is None and not autoencoder_files.is_file(recipe.ae) and not Path(recipe.ae).expanduser().exists():
        found.append(_download("autoencoder", recipe.ae, None, None))
    return found


def _base_repo(source: Identity) -> str | None:
    """Hub id of what completes a source that is a transformer alone; None when nothing is missing or it is a folder."""
    if source.base is not None:
        return source.pipeline.hub_id
    return source.published.repo if source.is_alone and source.published else None


def _download(role: str, repo: str, size: int | None, gated: bool | None) -> dict:
    cached = (hub_cache() / f"models--{repo.replace('/', '--')}" / "snapshots").is_dir()
    row = {"role": role, "repo": repo, "bytes": size, "gated": gated, "cached": cached}
    if gated and not cached:
        row["accept_at"] = f"https://huggingface.co/{repo}"
    return row


def hub_cache(env: Mapping[str, str] = os.environ) -> Path:
    """The hub's cache folder, as HF_HUB_CACHE and HF_HOME say."""
    home = Path(env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface").expanduser()
    return Path(env.get("HF_HUB_CACHE") or home / "hub").expanduser()


def of_set(recipe: Recipe, number: int) -> Recipe:
    """The recipe with the pictures of set ``number`` as its `data`."""
    return recipe.model_copy(update={"data": recipe.data_of(number)})


def of_alignment(recipe: Recipe) -> Recipe:
    """The recipe with the pictures of its first phase, on which embedder and head are aligned, as its `data`."""
    return of_set(recipe, recipe.aligned_set)


def disk(recipe: Recipe, sizes: Shapes) -> dict:
    """Bytes on disk by kind, and at the peak: ``recipe.keep`` says what is removed on the way."""
    kinds = _kinds(recipe, sizes)
    return {
        "bytes": {**kinds, "checkpoints": sum(_checkpoints(recipe, sizes).values())},
        "peak": kinds["downloads"] + run_peak(recipe, sizes, bundle=kinds["bundle"]),
        "keep": recipe.keep,
        "basis": "sizes from parameter counts; pictures at 1.6 B per px assumed",
    }


def run_peak(recipe: Recipe, sizes: Shapes, until: str | None = None, bundle: float = 0) -> float:
    """Bytes that the run folder holds at its fullest.

    Args:
        until: the last stage that runs; None: all.
        bundle: bytes of the bundle, where it counts too.
    """
    kinds, last = _kinds(recipe, sizes), len(recipe.adapt.phases)
    held = {
        ("import", "weights"): kinds["import"],
        **{(one.of("surgery"), "weights"): kinds["surgery"] / sizes.networks for one in sizes.experts},
        **{(names.of_set("data", number), "pictures"): picture_bytes(recipe, sizes, number) for number in recipe.sets},
        **{
            (names.of_set("latents", number), "latents"): sum(_cached(recipe, sizes, number).values())
            for number in recipe.sets
        },
        ("quantize", "weights"): kinds["quantised"],
        ("quantize", "spool"): kinds["spool"],
        ("bundle", "bundle"): bundle,
        **{
            (one.of(f"merge-{number}"), "weights"): kinds["merged"] / last / sizes.networks
            for number in range(1, last + 1)
            for one in sizes.experts
        },
        **{(stage, "checkpoints"): size for stage, size in _checkpoints(recipe, sizes).items()},
    }
    return needs.peak(held, recipe, kinds["import"] > 0, until, sizes.experts)


def _checkpoints(recipe: Recipe, sizes: Shapes) -> dict[str, float]:
    """Stage -> bytes of its newest checkpoint and the one before it: fp32 weight, two moments, EMA."""
    phases = enumerate(recipe.adapt.phases, 1)
    each = {f"adapt-{number}": 2 * 16 * sizes.trainable(phase).trained for number, phase in phases}
    return {one.of(stage): size for stage, size in each.items() for one in sizes.experts}


def _kinds(recipe: Recipe, sizes: Shapes) -> dict[str, float]:
    """Bytes by kind, but for checkpoints, if nothing is removed."""
    converted = sizes.converted
    cached = [_cached(recipe, sizes, number) for number in recipe.sets]
    fetched = sum(row["bytes"] or 0 for row in downloads(recipe, sizes) if not row["cached"])
    quantised = network_bytes(recipe, sizes) if recipe.quantize.format != "none" else 0.0
    companions = BF16 * sizes.companions + sizes.codec.bytes
    dense = BF16 * sizes.networks * converted.parameters
    imported = bool(recipe.base or recipe.loras) or (sizes.source.path is not None and sizes.source.path.is_file())
    return {
        "downloads": fetched,
        "pictures": sum(picture_bytes(recipe, sizes, number) for number in recipe.sets),
        "latents": sum(part["latents"] for part in cached),
        "text": sum(part["text"] for part in cached),
        "import": dense if imported else 0,
        "surgery": 0 if imported else dense,  # what import wrote is linked, but for embedder and head
        "checkpoints": 0.0,
        "merged": dense * len(recipe.adapt.phases),
        "spool": _spool(recipe, sizes),
        "quantised": quantised,
        "bundle": (quantised or dense) + companions,
    }


def network_bytes(recipe: Recipe, sizes: Shapes) -> float:
    """Bytes of the network in the bundle: 4-bit linears, and all else in 16 bits."""
    section, layers = recipe.quantize, [layer for layer in sizes.converted.layers if not layer.convolution]
    held: set[str] = set()
    if section.format != "none":
        shapes = {layer.name: (layer.outputs, layer.inputs) for layer in layers}
        targets = sizes.family.quant_targets(shapes, section.dense, section.container)
        held = {*targets.svdq, *targets.awq}
    small = sum(layer.weights for layer in layers if layer.name in held)
    return QUANTISED_BYTES * small + BF16 * float(sizes.converted.parameters - small)


def _cached(recipe: Recipe, sizes: Shapes, number: int) -> dict[str, float]:
    """Bytes of the latents and of the text embeddings of set ``number``."""
    count = recipe.data_of(number).count
    return {"latents": latent_bytes(recipe, sizes, number), "text": count * text_bytes(recipe, sizes)}


def latent_bytes(recipe: Recipe, sizes: Shapes, number: int) -> float:
    """Bytes of all latents of set ``number``: of the base those of the paired pictures."""
    new = recipe.data_of(number).count * sizes.latent_numbers(recipe.sides(number), aligned=False)
    return LATENT * (new + paired_pictures(recipe, sizes, number) * sizes.latent_numbers(()))


def paired_pictures(recipe: Recipe, sizes: Shapes, number: int) -> int:
    """Pictures of set ``number`` that the base's autoencoder encodes too: for the alignment only."""
    if number != recipe.aligned_set:
        return 0
    return min(recipe.data_of(number).count, enough(*sizes.alignment_rows))


def text_bytes(recipe: Recipe, sizes: Shapes) -> float:
    """Bytes of the embeddings of one caption that the run keeps."""
    return embedding_bytes(recipe, sizes) if recipe.latents.text == "cache" else 0.0


def embedding_bytes(recipe: Recipe, sizes: Shapes) -> float:
    """Bytes of the embeddings of one caption."""
    return sizes.conditions * (4 if recipe.dtype == "fp32" else BF16) * float(sizes.text * sizes.base.text_width)


def picture_bytes(recipe: Recipe, sizes: Shapes, number: int) -> float:
    """Bytes of the pictures of set ``number`` that the run keeps: drawn, or copied out of shards."""
    data = recipe.data_of(number)
    if data.kind == "synthetic":
        return data.count * sizes.frames * math.prod(sizes.usual_size(data, data.resolution)) * PNG_BYTES_PER_PIXEL
    from dcgen_convert.data import given  # it needs an imaging library

    return given.shard_bytes(given.parse_all(data.paths))


def _spool(recipe: Recipe, sizes: Shapes) -> float:
    """Bytes that a quantisation keeps of its blocks' outputs: those of the block before and of the one in work."""
    section, last = recipe.quantize, recipe.adapt.phases[-1]
    if section.format == "none":
        return 0.0
    guided = sizes.passes(recipe.bundle.guidance)
    calls = guided * section.calibration.prompts * (section.calibration.steps or recipe.bundle.steps)
    return 2.0 * calls * BF16 * sizes.tokens(last) * sizes.converted.width
