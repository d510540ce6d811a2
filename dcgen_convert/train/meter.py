"""How fast a run trains: tokens per second, model FLOPs utilisation (MFU) and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from dcgen_convert.families import Family, Text
from dcgen_convert.families.base import Network, references_of
from dcgen_convert.planning.arithmetic import forward_flops, side_passes, train_flops
from dcgen_convert.planning.structures import structure

if TYPE_CHECKING:
    from dcgen_convert.recipe.schema import Adapt

PEAKS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s with fp32 accumulation, from the makers' data sheets.

The longest name that a device's name holds counts.
"""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, None for one that is not listed."""
    names = [name for name in PEAKS if all(word in device_name for word in name.split())]
    return PEAKS[max(names, key=len)] if names else None


@dataclass(frozen=True)
class Meter:
    """tokens: image and text tokens of one sample, those of references too; flops: of one training sample; peak: FLOP/s
    of one device.

    flops and peak are None where the device's peak is not known: then there is no MFU.
    """

    tokens: int
    flops: float | None
    peak: float | None

    def read(self, samples: int, seconds: float, devices: int) -> dict[str, float]:
        """Figures of a step of ``samples`` on ``devices``: tokens_per_s, mfu (where known), memory_gib of this rank."""
        figures = {"tokens_per_s": samples * self.tokens / seconds}
        if self.flops and self.peak:
            figures["mfu"] = samples * self.flops / seconds / (self.peak * devices)
        return {**figures, "memory_gib": memory_gib()}


def memory_gib() -> float:
    """Highest GPU memory in use by tensors so far, or what this process holds now where there is no GPU; GiB."""
    held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return held / 2**30


def meter_of(
    family: Family,
    model: Network,
    shape: Sequence[int],
    text: Text,
    adapt: Adapt,
    full: bool,
    consistency: float = 0.0,
) -> Meter:
    """The meter of one training task at one size.

    Args:
        shape: (C, h, w) of a latent.
        text: the condition of one row of that size, as the cache gives it; of a model that edits with the reference,
            whose tokens count too.
        adapt: objective (recipe section ``adapt``).
        consistency: of the phase.
        full: whether every weight trains.
    """
    beside = [] if family.reference_channels else references_of(text)
    pictures = [shape, *(value.shape[1:] for value in beside)]
    image = sum(math.prod(family.grid(sides, family.patch(model.config, c))) for c, *sides in pictures)
    words = max((value.shape[1] for value in text.values() if value.ndim == 3), default=0)
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if peak is None:
        return Meter(image + words, None, None)
    once = forward_flops(structure({**model.config, "_class_name": type(model).__name__}, family), image, words)
    # MFU counts the work that the loss asks for: recomputed activations are overhead
    flops = train_flops(once, full=full, checkpointing=False, passes=side_passes(adapt, consistency))
    return Meter(image + words, flops, peak)
