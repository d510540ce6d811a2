"""Which ZeRO stage, offload and micro-batch a training phase runs with on given GPUs, and what to change when none
fits."""

from __future__ import annotations

from dataclasses import dataclass

from dcgen_convert.plan import memory
from dcgen_convert.plan.arithmetic import Trainable
from dcgen_convert.plan.layers import Structure
from dcgen_convert.schema import Adapt, Phase


@dataclass(frozen=True)
class Fit:
    """The decision for one phase. micro_batch: pictures per GPU and pass; limit: the largest that would fit.

    reason: one line for the console; problem: None, or why it cannot run, with the smallest change that would.
    """

    zero: int
    offload: str
    gpus: int
    micro_batch: int
    limit: int
    reason: str
    problem: str | None
    memory: memory.Memory


def micro_batch(share: int, limit: int) -> int:
    """The largest divisor of a GPU's share of the batch that fits, so that accumulation comes out even; at least 1."""
    return next((size for size in range(min(share, limit), 0, -1) if share % size == 0), 1)


def sample_bytes(adapt: Adapt, structure: Structure, tokens: int, dtype: str) -> float:
    """Activations of one picture with ``tokens`` image and text tokens; the batched null prompt counts as a second one."""
    batched = adapt.objective == "guidance-corrected" and adapt.null_pass == "batched"
    passes = (1 + batched) * numbers_of(adapt, dtype).element / 2
    return passes * memory.activations(tokens, structure.width, structure.blocks, adapt.checkpointing)


def numbers_of(adapt: Adapt, dtype: str) -> memory.Numbers:
    return memory.Numbers(4 if dtype == "fp32" else 2, adapt.ema > 0)


def fit(
    adapt: Adapt,
    phase: Phase,
    structure: Structure,
    trained: Trainable,
    tokens: int,
    gpus: int,
    gpu_bytes: float,
    dtype: str = "bf16",
) -> Fit:
    """Decide for one phase.

    Args:
        tokens: image + text tokens per picture.
        gpu_bytes: memory that training may use on each GPU.
        dtype: "fp32" | "bf16", of weights, gradients and activations.
    """
    sample, numbers = sample_bytes(adapt, structure, tokens, dtype), numbers_of(adapt, dtype)
    sizes = (trained.frozen, trained.trained, gpus)
    share = max(1, phase.batch // gpus)
    if adapt.zero == "auto":
        choice = memory.choose(*sizes, sample, phase.micro_batch or 1, gpu_bytes, numbers)
        zero, offload, reason = 3 if choice.zero is None else choice.zero, choice.offload, choice.reason
    else:
        zero, offload, reason = adapt.zero, adapt.offload, f"ZeRO-{adapt.zero} as set"
    limit = memory.max_micro_batch(*sizes, zero, offload, sample, gpu_bytes, numbers)
    size = phase.micro_batch or micro_batch(share, limit)
    problem = None
    if limit < size:
        change = memory.smallest_change(*sizes, sample, gpu_bytes, numbers)
        if limit:
            change = f"--set adapt.phases.*.micro_batch={micro_batch(share, limit)}"
        room = f"{gpu_bytes / memory.GIB:.1f} GiB per GPU"
        problem = f"training at {phase.resolution} px does not fit {room} at micro-batch {size}: use {change}"
    need = memory.memory(*sizes, zero, offload, sample, size, numbers)
    return Fit(zero, offload, gpus, size, limit, reason, problem, need)
