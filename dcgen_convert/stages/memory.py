"""How much memory a stage took, and what to do when it was short of it: each stage has a setting of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dcgen_convert.core import clock, resident
from dcgen_convert.core.errors import ResourceError, is_out_of_memory
from dcgen_convert.core.journal import Stage
from dcgen_convert.stages import folders
from dcgen_convert.stages.depends import ADAPT, MERGE, kind_of, without_expert

WHOLE = "the stage holds one network at a time: use a machine with more memory"
TRAINING = "raise --zero or --offload, or use more or larger GPUs"
LOWER = {
    folders.DATA: "lower data.batch (single pictures are tried already) or data.resolution, or use a larger GPU",
    folders.LATENTS: "lower latents.batch (single pictures are tried already) or adapt.phases.*.resolution",
    folders.ALIGN_EMBEDDER: "lower latents.batch, which many pictures are read at once",
    folders.ALIGN_HEAD: f"lower latents.batch for the start, align_head.batch for the steps; or {TRAINING}",
    ADAPT: f"lower adapt.phases.{{}}.micro_batch, or {TRAINING}; `dcgen-convert plan` shows what fits",
    MERGE: WHOLE,
    folders.QUANTIZE: "lower quantize.calibration.batch",
    folders.VERIFY: "lower data.batch, which many pictures are drawn at once, or evaluate.prompts",
}


@contextmanager
def named(stage: str) -> Iterator[None]:
    """Give an error that memory was short the name of its stage, and the hint which setting to lower.

    Raises:
        ResourceError: memory was short in here.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        number = without_expert(stage).rpartition("-")[2]
        hint = LOWER.get(kind_of(stage), WHOLE).format(int(number) - 1 if number.isdigit() else "*")
        what = str(error).partition("\n")[0][:300] or "(no message)"
        raise ResourceError(f"stage {stage}: out of memory: {what}", f"{hint}; then resume the run") from error


@contextmanager
def watched(stage: Stage) -> Iterator[None]:
    """Note the highest memory in here as ``stage.peak``: "host", resident bytes of this process, and "gpu"."""
    clock.begin(stage.folder.name)
    resident.tidy()  # else a stage would be charged for what the one before it has left
    resident.forget()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield
    if (host := resident.highest()) is not None:
        stage.peak["host"] = host
    if torch.cuda.is_available():
        stage.peak["gpu"] = torch.cuda.max_memory_reserved()
