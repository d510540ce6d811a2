"""How training is laid out on the devices: ZeRO stage, offload and micro-batch, by the memory arithmetic of `plan`."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from dcgen_convert.core.errors import ResourceError
from dcgen_convert.networks import pipelines
from dcgen_convert.planning import plan
from dcgen_convert.planning.memory import GIB
from dcgen_convert.recipe.schema import Phase
from dcgen_convert.stages.job import Job


def memory_per_rank(world: int) -> float:
    """Bytes that each rank can train in: its GPU's, or its part of the machine's free memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().available / world


def fitted(job: Job, phase: Phase, label: str, held: float = 0.0) -> dict[str, Any]:
    """Choose {"zero", "offload", "micro_batch"} for a phase, and tell the console; ResourceError when nothing fits.

    Args:
        held: bytes of a rank that the phase cannot have.
    """
    world = job.crew.world
    memory = memory_per_rank(world) - held
    fit = plan.fit_phase(job.recipe, job.identity, phase, world, gpu_bytes=memory)
    if fit.problem:
        message, change = fit.problem
        raise ResourceError(f"{label}: {message}", f"{change}; dcgen-convert plan shows what fits")
    job.console.say(
        f"{label}: {fit.reason}; micro-batch {fit.micro_batch} of the {phase.batch // world} pictures "
        f"per rank and step, {fit.limit} would fit in {memory / GIB:.1f} GiB"
    )
    return {"zero": fit.zero, "offload": fit.offload, "micro_batch": fit.micro_batch}


def first_device(layout: dict[str, Any]) -> str:
    """Device to load a model on before the engine gets it.

    With ZeRO 3 that is the CPU: the engine then moves only the shards of this rank.
    """
    return "cpu" if layout["zero"] == 3 else pipelines.device()
