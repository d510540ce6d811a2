"""AWQ-layout W4A16 linears for modulation layers (nunchaku's file format): unsigned 4-bit codes, an affine scale and
zero per 64 channels.

value[n, k] = code[n, k] * scale[n, k / 64] + zero[n, k / 64]. The zero is a weight and no code, because the kernel uses
one fused multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dcgen_convert.svdquant.checks import check_awq_shape, check_finite
from dcgen_convert.svdquant.formats import round_bf16
from dcgen_convert.svdquant.settings import AWQ_GROUP

SHRINK = tuple(1 - i / 40 for i in range(13))  # clipping ranges tried, of the group's full range


@dataclass
class AwqLinear:
    """codes uint8 (N, K); scales, zeros float32 (N, K/64) with bfloat16 values; bias (N,) bfloat16 or None."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor | None
    record: dict[str, Any] = field(default_factory=dict)

    def dense(self) -> torch.Tensor:
        """The bfloat16 weight that the kernel multiplies with, as float32 (N, K)."""
        n, k = self.codes.shape
        values = self.codes.view(n, -1, AWQ_GROUP).float() * self.scales.unsqueeze(-1) + self.zeros.unsqueeze(-1)
        return round_bf16(values).view(n, k)


def quantize_awq(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> AwqLinear:
    """Affine 4-bit per 64 channels, asymmetric; per group the clipping range with the least squared error.

    Errors: InputError by name for a shape that the layout cannot hold, and for NaN or infinite values.
    """
    check_awq_shape(name, tuple(weight.shape))
    check_finite(f"{name}.weight", weight)
    if bias is not None:
        check_finite(f"{name}.bias", bias)
    n, k = weight.shape
    weight = weight.float()
    groups = weight.view(n, -1, AWQ_GROUP)  # (N, G, 64)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    centre, reach = (low + high) / 2, (high - low) / 2
    best = _clipped(groups, centre, reach * SHRINK[0])
    for shrink in SHRINK[1:]:
        tried = _clipped(groups, centre, reach * shrink)
        better = tried[3] < best[3]
        best = tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))
    code, scale, zero, _ = best
    bias = None if bias is None else bias.to(torch.bfloat16)
    layer = AwqLinear(code.to(torch.uint8).view(n, k), scale.squeeze(-1), zero.squeeze(-1), bias)
    error = ((layer.dense() - weight).norm() / weight.norm().clamp(min=1e-30)).item()
    layer.record = {"module": name, "format": "awq_w4a16", "shape": [n, k], "weight_error": error}
    return layer


def _clipped(groups: torch.Tensor, centre: torch.Tensor, reach: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(codes, scales, zeros, squared error per group) of groups (N, G, 64) that are clipped to centre -+ reach."""
    scale = round_bf16(2 * reach / 15).clamp(min=2.0**-100)
    zero = round_bf16(centre - reach)
    code = ((groups - zero) / scale).round_().clamp_(0, 15)
    error = (round_bf16(code * scale + zero) - groups).square_().sum(-1, keepdim=True)
    return code, scale, zero, error
