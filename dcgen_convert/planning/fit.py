"""Which ZeRO stage, offload and micro-batch a training phase runs with on given GPUs; what to change when none fits."""

from __future__ import annotations

from dataclasses import dataclass

from dcgen_convert.planning import memory
from dcgen_convert.planning.shapes import Shapes
from dcgen_convert.planning.start import frozen_numbers
from dcgen_convert.recipe.schema import Phase, Recipe


@dataclass(frozen=True)
class Fit:
    """The decision for one phase.

    Attributes:
        micro_batch: pictures per GPU and pass.
        limit: the largest micro-batch that would fit.
        reason: one line for the console.
        problem: why the phase cannot run, and the smallest change that helps; None when it can.
    """

    zero: int
    offload: str
    gpus: int
    micro_batch: int
    limit: int
    reason: str
    problem: tuple[str, str] | None
    memory: memory.Memory


def micro_batch(part: int, limit: int) -> int:
    """Pictures per pass: the largest divisor of a GPU's part of the batch that is at most ``limit``, and at least 1."""
    return next((size for size in range(min(part, limit), 0, -1) if part % size == 0), 1)


def head_phase(recipe: Recipe) -> Phase:
    """The training of stage align-head, written as a phase: a LoRA of rank 0 leaves only the embedder and the head.

    The blocks are frozen in that stage. The gradient of the embedder still passes through all of them, so the
    activations need as much memory as in a phase.
    """
    changes = {"mode": "lora", "rank": 0, "batch": recipe.align_head.batch, "micro_batch": None, "consistency": 0.0}
    return recipe.adapt.phases[0].model_copy(update=changes)


def training(recipe: Recipe, phase: Phase, sizes: Shapes) -> memory.Training:
    """What a phase trains, as the memory arithmetic wants it."""
    adapt, trained = recipe.adapt, sizes.trainable(phase)
    element = 4 if recipe.dtype == "fp32" else 2
    shape, tokens = sizes.converted, sizes.tokens(phase)
    sample = element / 2 * memory.activations(tokens, shape.width, shape.blocks, adapt.checkpointing)
    frozen = trained.frozen + frozen_numbers(recipe, phase, sizes)
    return memory.Training(frozen, trained.trained, sample, element, adapt.ema > 0)


def decide(recipe: Recipe, phase: Phase, sizes: Shapes, gpus: int, gpu_bytes: float) -> Fit:
    """Decide for one phase.

    Args:
        gpu_bytes: memory that training may use on each GPU.
    """
    adapt, what = recipe.adapt, training(recipe, phase, sizes)
    gpu_bytes -= sizes.encoders_beside(recipe)
    part = max(1, phase.batch // gpus)
    if adapt.zero == "auto":
        choice = memory.choose(what, gpus, phase.micro_batch or 1, gpu_bytes)
        zero, offload, reason = 3 if choice.zero is None else choice.zero, choice.offload, choice.reason
    else:
        zero, offload, reason = adapt.zero, adapt.offload, f"ZeRO-{adapt.zero} as set"
    limit = memory.max_micro_batch(what, gpus, zero, offload, gpu_bytes)
    size = phase.micro_batch or micro_batch(part, limit)
    problem = None
    if limit < size:
        change = memory.smallest_change(what, gpus, gpu_bytes)
        if limit:
            change = f"--set adapt.phases.*.micro_batch={micro_batch(part, limit)}"
        room = f"{gpu_bytes / memory.GIB:.1f} GiB per GPU"
        problem = f"training at {phase.resolution} px does not fit {room} at micro-batch {size}", f"use {change}"
    return Fit(zero, offload, gpus, size, limit, reason, problem, memory.estimate(what, gpus, zero, offload, size))
