"""The calibration set: what a transformer is given while it draws pictures, recorded call by call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.core.files import read_object, replacing, sha256, write_json
from dcgen_convert.core.progress import Bar
from dcgen_convert.data import images
from dcgen_convert.families import Family, pixel_memory
from dcgen_convert.networks import pipelines
from dcgen_convert.networks.at_once import AtOnce
from dcgen_convert.svdquant import trees

PROMPT_SEED = 7_919  # calibration prompts and noise are not those of the training pictures
CALLS = "calls"  # the folder of the recorded calls
DONE = "done.json"  # in that folder, once every picture is drawn


@dataclass(frozen=True)
class CalibrationSet:
    """The pictures that are drawn for a calibration.

    texts: one prompt or label per picture. references: for an editing model, the file of the picture that it is given
    with each of them. batch: pictures that are drawn at once. side: px. length: text tokens.
    """

    texts: Sequence[str]
    seed: int
    batch: int
    side: int
    steps: int
    guidance: float
    length: int
    references: Sequence[Sequence[Path]] = ()

    def missing(self, folder: Path) -> list[tuple[int, int]]:
        """[first, last) of the batches that are still to be drawn, whatever batch the others were drawn with.

        A batch with a damaged file is one of them.
        """
        done: set[int] = set()
        for path in folder.glob("drawn-*.json"):
            record = read_object(path)
            calls = {folder / name: digest for name, digest in record["calls"].items()}
            if all(file.exists() and sha256(file) == digest for file, digest in calls.items()):
                done.update(range(*record["pictures"]))
        found: list[tuple[int, int]] = []
        most = pixel_memory.together(self.batch, self.side**2, pixel_memory.DRAWN)
        for picture in range(len(self.texts)):
            if picture in done:
                continue
            first, last = found[-1] if found else (0, -1)
            if picture == last and last - first < most:
                found[-1] = first, picture + 1
            else:
                found.append((picture, picture + 1))
        return found

    def draw_batch(self, first: int, last: int, family: Family, pipeline: Any) -> None:
        """Draw the pictures [first, last). They do not depend on who draws them."""
        pipelines.draw(
            family,
            pipeline,
            self.texts[first:last],
            [self.seed + PROMPT_SEED + i for i in range(first, last)],
            side=self.side,
            steps=self.steps,
            guidance=self.guidance,
            length=self.length,
            references=images.read_references(self.references[first:last], self.side),
        )


def record_calls(
    folder: Path,
    family: Family,
    pipeline: Callable[[], Any],
    pictures: CalibrationSet,
    bar: Bar,
    batches: Sequence[tuple[int, int]],
    tell: Callable[[str], object] = lambda _: None,
) -> None:
    """Draw ``batches`` of ``pictures``, and keep what the transformer is given: one file of `trees` per forward call.

    Where memory is short, a batch is halved.

    Args:
        pipeline: makes the pipeline; not called without a batch. It is gone afterwards: quantising needs the memory.
        batches: [first, last) of each, from `CalibrationSet.missing`.
        tell: takes a message about short memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not batches:
        return
    given: list[Path] = []  # files of the pictures in work
    first = 0  # of these pictures
    drawing, halving = pipeline(), AtOnce("calibration", tell)

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)  # some pipelines pass the latents by position
        given.append(folder / f"call-{first:05d}-{len(given):05d}.safetensors")
        with replacing(given[-1]) as temporary:
            trees.save(bound.arguments, temporary)

    def draw(part: range) -> None:
        nonlocal first
        given.clear()
        first = part.start
        pictures.draw_batch(first, part.stop, family, drawing)
        calls = {path.name: sha256(path) for path in given}
        write_json(folder / f"drawn-{first:05d}.json", {"pictures": [first, part.stop], "calls": calls})
        bar.advance(len(part))

    handle = drawing.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch in batches:
            for _ in halving.parts(range(*batch), draw):
                pass
    finally:
        handle.remove()


def read_calls(folder: Path) -> list[Path]:
    """The recorded calls, in order."""
    return sorted(folder.glob("call-*.safetensors"))
