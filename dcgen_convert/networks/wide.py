"""bfloat16 networks on a CPU that has no instructions for it: each layer is computed in float32.

Without such instructions a product of bfloat16 matrices is 5 times as slow as in float32, and a convolution 250 times
(one AVX2 core). So weights and activations stay bfloat16, and a layer takes float32 copies of its inputs while it
works. Its result is rounded once, where the native instructions round once too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NATIVE = "AVX512"  # the least that oneDNN needs for bfloat16


class WideLinear(nn.Linear):
    """A linear that computes in float32."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype is not torch.bfloat16:
            return super().forward(input)
        return F.linear(input.float(), self.weight.float(), _float(self.bias)).bfloat16()


class WideConv(nn.Conv2d):
    """A convolution that computes in float32."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dtype is not torch.bfloat16:
            return super()._conv_forward(input, weight, bias)
        return super()._conv_forward(input.float(), weight.float(), _float(bias)).bfloat16()


WIDE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: WideLinear, nn.Conv2d: WideConv}


def widen(network: nn.Module) -> None:
    """Let the bfloat16 linears and convolutions of a network on a slow CPU compute in float32; else do nothing."""
    if torch.backends.cpu.get_cpu_capability() == NATIVE:
        return
    for module in network.modules():
        wide = WIDE.get(type(module))
        weight = getattr(module, "weight", None)
        if wide and isinstance(weight, Tensor) and weight.dtype is torch.bfloat16 and weight.device.type == "cpu":
            module.__class__ = wide  # in place: its tensors, its name and its hooks stay


def _float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float()
