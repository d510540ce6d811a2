"""Recording what a transformer is given while it draws: the calibration set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.core.files import replacing, write_json
from dcgen_convert.families import Family
from dcgen_convert.networks import pipelines
from dcgen_convert.svdquant import trees

PROMPT_SEED = 7_919  # calibration prompts and noise are not those of the training pictures


CALLS, DONE = "calls", "done.json"


def record_calls(
    folder: Path,
    family: Family,
    pipeline: Callable[[], Any],
    texts: Sequence[str],
    seed: int,
    batch: int,
    bar: Any,
    share: tuple[int, int] = (0, 1),
    **call: Any,
) -> None:
    """What the transformer is given while it draws ``texts``: one file of `trees` per forward call.

    Args:
        pipeline: makes the pipeline; not called when all is there. It is gone afterwards: quantising needs the memory.
        share: (rank, ranks): of the batches this draws every ``ranks``-th. Those that are there are not drawn again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, ranks = share
    starts = [start for number, start in enumerate(range(0, len(texts), batch)) if number % ranks == rank]
    missing = [start for start in starts if not (folder / f"drawn-{start:05d}.json").exists()]
    bar.advance(sum(min(batch, len(texts) - start) for start in starts if start not in missing))
    if not missing:
        return
    given: list[Path] = []  # by the batch in work
    drawing = pipeline()

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)  # some pipelines pass the latents by position
        given.append(folder / f"call-{start:05d}-{len(given):05d}.safetensors")
        with replacing(given[-1]) as temporary:
            trees.save(bound.arguments, temporary)

    handle = drawing.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for start in missing:
            given.clear()
            part = texts[start : start + batch]
            pipelines.draw(family, drawing, part, [seed + PROMPT_SEED + start + i for i in range(len(part))], **call)
            write_json(folder / f"drawn-{start:05d}.json", {"calls": len(given)})
            bar.advance(len(part))
    finally:
        handle.remove()


def read_calls(folder: Path) -> list[Path]:
    """The recorded calls, in order."""
    return sorted(folder.glob("call-*.safetensors"))
