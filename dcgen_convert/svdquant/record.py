"""The calibration set: what a transformer is given while it draws pictures, recorded call by call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.core.files import replacing, write_json
from dcgen_convert.core.progress import Bar
from dcgen_convert.families import Family
from dcgen_convert.networks import pipelines
from dcgen_convert.svdquant import trees

PROMPT_SEED = 7_919  # calibration prompts and noise are not those of the training pictures
CALLS = "calls"  # the folder of the recorded calls
DONE = "done.json"  # in that folder, once every picture is drawn


@dataclass(frozen=True)
class CalibrationSet:
    """The pictures that are drawn for a calibration.

    texts: one prompt or label per picture. batch: pictures that are drawn at once. side: px. length: text tokens.
    """

    texts: Sequence[str]
    seed: int
    batch: int
    side: int
    steps: int
    guidance: float
    length: int

    def starts(self, part: tuple[int, int]) -> list[int]:
        """First pictures of the batches that fall to ``part`` = (rank, ranks): every ``ranks``-th batch."""
        rank, ranks = part
        return list(range(0, len(self.texts), self.batch))[rank::ranks]

    def batch_at(self, start: int) -> Sequence[str]:
        """The texts of the batch that begins at picture ``start``."""
        return self.texts[start : start + self.batch]

    def draw_batch(self, start: int, family: Family, pipeline: Any) -> None:
        """Draw the batch that begins at picture ``start``. Its pictures do not depend on who draws it."""
        texts = self.batch_at(start)
        seeds = [self.seed + PROMPT_SEED + start + i for i in range(len(texts))]
        pipelines.draw(
            family,
            pipeline,
            texts,
            seeds,
            side=self.side,
            steps=self.steps,
            guidance=self.guidance,
            length=self.length,
        )


def record_calls(
    folder: Path,
    family: Family,
    pipeline: Callable[[], Any],
    pictures: CalibrationSet,
    bar: Bar,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Draw ``pictures``, and keep what the transformer is given: one file of `trees` per forward call.

    Args:
        pipeline: makes the pipeline; not called when all is there. It is gone afterwards: quantising needs the memory.
        part: (rank, ranks); a rank draws every ``ranks``-th batch. Batches that are there are not drawn again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = pictures.starts(part)
    missing = [start for start in starts if not _drawn(folder, start).exists()]
    bar.advance(sum(len(pictures.batch_at(start)) for start in starts if start not in missing))
    if not missing:
        return
    given: list[Path] = []  # files of the batch in work
    drawing = pipeline()

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)  # some pipelines pass the latents by position
        given.append(folder / f"call-{start:05d}-{len(given):05d}.safetensors")
        with replacing(given[-1]) as temporary:
            trees.save(bound.arguments, temporary)

    handle = drawing.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for start in missing:
            given.clear()
            pictures.draw_batch(start, family, drawing)
            write_json(_drawn(folder, start), {"calls": len(given)})
            bar.advance(len(pictures.batch_at(start)))
    finally:
        handle.remove()


def _drawn(folder: Path, start: int) -> Path:
    """The file that marks a batch as drawn."""
    return folder / f"drawn-{start:05d}.json"


def read_calls(folder: Path) -> list[Path]:
    """The recorded calls, in order."""
    return sorted(folder.glob("call-*.safetensors"))
