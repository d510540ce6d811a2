"""What the measures of `evaluate.metrics` say of the bundle, beside its base: the same rows as the verb `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.bundle import lineage
from dcgen_convert.core import pulse
from dcgen_convert.data import contents, images, references
from dcgen_convert.data.buckets import Size
from dcgen_convert.data.references import References, together
from dcgen_convert.evaluation import measures, rows
from dcgen_convert.evaluation.measure import Measure, Weights
from dcgen_convert.evaluation.pixels import through_jpeg
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe.drawable import own_side
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages import captions, edited
from dcgen_convert.stages.job import Job


def require(job: Job, seed: int) -> None:
    """Refuse measures that cannot run, before any work is done.

    Args:
        seed: of the prompts.
    Raises:
        InputError: a name, a prompt or a reference that cannot be. AccessError: weights are not at hand.
    """
    _settled(job, captions.others(job, job.recipe.evaluate.prompts, seed))
    _references(job)


def evaluation(
    job: Job,
    files: Mapping[str, Sequence[Path]],
    texts: Sequence[str],
    seed: int,
    sizes: Mapping[str, Size],
    edited: Sequence[Path] = (),
) -> dict[str, Any]:
    """The rows, and what they were measured on.

    Args:
        files: set (`rows`) -> its pictures. texts: their prompts. seed: of the first picture. sizes: (height,
            width) in px of "converted" and "base". edited: the first reference of each prompt, for a model that edits.
    """
    size, given = min(sizes.values()), _references(job)
    frames = job.shown_frames
    found = _settled(job, texts)
    figures = {
        name: rows.measured(_batches(pictures, texts, size, frames, given is not None, edited), found)
        for name, pictures in files.items()
    }
    if given is not None:
        figures[rows.REFERENCE] = rows.measured(given.batches(min(size)), found)
    table = rows.rows(figures, found)
    for name, value in rows.values(table).items():
        job.console.say(f"evaluate: {name} {value:.4g}")
    document = {
        "base": job.recipe.source,
        "prompts": job.recipe.data.prompts,
        "count": len(texts),
        "seed": seed,
        "sides": {**{name: one[0] for name, one in sizes.items()}, "measured": size[0]},
        "jpeg": given is not None,
        "reference": None if given is None else {"name": given.name, "count": given.count},
        "measures": table,
    }
    kept: dict[str, Any] = lineage.without_places(document)
    return kept


def _settled(job: Job, texts: Sequence[str]) -> list[Measure]:
    recipe = job.recipe.evaluate
    side = min(job.resolution, own_side(job.identity, job.ae.grid, job.resolution))
    place: dict[str, Any] = {
        "side": side,
        "device": pipelines.device(),
        "offline": job.identity.offline,
        "recipe": True,
        "edited": edited.tried(edited.judging(job)),
        "moving": job.frames > 0,
    }
    return measures.chosen(recipe.measures, weights(job.recipe), texts, **place)[0]


def weights(recipe: Recipe) -> Weights:
    """Where the networks of the measures lie."""
    given = recipe.evaluate
    return Weights(given.clip, given.dino, given.pickscore, given.inception, given.detector)


def _references(job: Job) -> References | None:
    name = job.recipe.evaluate.reference
    return None if name is None else references.read(name)


def _batches(
    files: Sequence[Path], texts: Sequence[str], size: Size, frames: int, jpeg: bool, edited: Sequence[Path]
) -> Iterator[rows.Batch]:
    """The pictures, (B, 3, *size) in [-1, 1], or videos of ``frames`` frames, with their prompts and references."""
    count = max(1, together(*size) // max(1, frames))
    for start in range(0, len(files), count):
        part = slice(start, start + count)
        whole = (frames, *size) if frames else size
        pixels = torch.stack([contents.read(file, [whole])[0] for file in files[part]])
        shown = through_jpeg(pixels) if jpeg else pixels
        references = [images.read_pixels(file, *size) for file in edited[part]]
        yield (shown, list(texts[part]), torch.stack(references)) if references else (shown, list(texts[part]))
        pulse.bump()
