"""Plain block-16 NVFP4: one linear from start to end, for containers without smoothing and without a low-rank branch.

y = W x + b with W (N, K), W ~= e2m1 * weight_scale[n, k // 16] * weight_scale_2. The inputs are rounded to NVFP4 too,
on one scale for the whole tensor, which the calibration found: `input_scale`.
The tensors are those that diffusers' quantiser `bfl` reads (ModelOpt's layout of NVFP4). Source: diffusers 0.42,
quantizers/bfl/utils.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dcgen_convert.svdquant.activation import quantize_scaled
from dcgen_convert.svdquant.checks import check_finite, check_plain_shape
from dcgen_convert.svdquant.formats import E2M1_MAX, E4M3_MAX
from dcgen_convert.svdquant.gptq import gptq
from dcgen_convert.svdquant.layer import errors, input_metric
from dcgen_convert.svdquant.settings import GROUP, QuantSettings
from dcgen_convert.svdquant.stats import Stats
from dcgen_convert.svdquant.weights import QuantWeight, group_scales, search_factor, tensor_scale

NVFP4 = "nvfp4"
HALF = torch.bfloat16
# Inputs may grow to this multiple of the largest that the calibration saw before they are cut off. It costs nothing:
# the scales of 16 channels are floating-point numbers, and span a factor of 2^14 without losing precision.
ROOM = 2.0


@dataclass
class PlainLinear:
    """One layer. Every tensor already holds the values that the file will hold."""

    quantised: QuantWeight
    input_scale: float  # a float32 value
    bias: torch.Tensor | None  # (N,) bfloat16
    record: dict[str, Any] = field(default_factory=dict)

    def dense(self) -> torch.Tensor:
        """float32 (N, K): the weight that the layer stands for."""
        return self.quantised.dequantise()

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """y - b for tokens x (T, K), with the kernel's rounding of its inputs, accumulated in float32."""
        return quantize_scaled(x, self.input_scale) @ self.dense().T


def quantize_plain(
    name: str, weight: torch.Tensor, bias: torch.Tensor | None, stats: Stats, settings: QuantSettings
) -> PlainLinear:
    """Round one layer: scales searched with the weight of each channel's inputs, then GPTQ on their Hessian.

    The record gives two relative output errors on tokens that took no part in choosing: that of rounding to nearest,
    and that of the result.
    Errors: InputError by name for shapes that the format cannot hold, and for NaN or infinite values.
    """
    check_plain_shape(name, tuple(weight.shape))
    check_finite(f"{name}.weight", weight)
    if bias is not None:
        check_finite(f"{name}.bias", bias)
    whole = weight.to(settings.device).float()
    importance, lower = input_metric(stats, torch.ones(whole.shape[1], device=whole.device))
    scale = tensor_scale(whole, NVFP4)
    micro = group_scales(whole, NVFP4, scale, search_factor(whole, NVFP4, scale, importance))
    rounded = gptq(whole, lower, micro, scale, NVFP4)
    layer = PlainLinear(rounded, input_scale(stats), None if bias is None else bias.to(HALF))
    tokens = stats.tokens.to(settings.device)
    layer.record = {"module": name, "format": NVFP4, "shape": list(weight.shape)}
    layer.record |= errors(whole, tokens, layer, NVFP4, lambda x: quantize_scaled(x, layer.input_scale))
    return layer


def input_scale(stats: Stats) -> float:
    """The scale of the whole input tensor, a float32 value; 1 for an input that is always zero."""
    largest = ROOM * stats.amax.max().item() / (E2M1_MAX * E4M3_MAX)
    return torch.tensor(largest or 1.0, dtype=torch.float32).item()


def plain_spec(shape: tuple[int, int], bias: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of a layer with weight shape (N, K)."""
    n, k = shape
    spec: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.uint8, (n, k // 2)),
        "weight_scale": (torch.float8_e4m3fn, (n, k // GROUP[NVFP4])),
        "weight_scale_2": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    }
    return spec | ({"bias": (HALF, (n,))} if bias else {})


def pack_plain(layer: PlainLinear) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint. The code of an even channel stands in the lower four bits of its byte."""
    codes = layer.quantised.codes()
    tensors = {
        "weight": codes[:, 0::2] | codes[:, 1::2] << 4,
        "weight_scale": layer.quantised.micro.to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(layer.quantised.tensor_scale),
        "input_scale": torch.tensor(layer.input_scale),
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def unpack_plain(tensors: dict[str, torch.Tensor]) -> PlainLinear:
    """Inverse of `pack_plain`."""
    packed = tensors["weight"]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    scale = tensors["weight_scale_2"].item()
    weight = QuantWeight.from_codes(codes, tensors["weight_scale"].float(), scale, NVFP4)
    return PlainLinear(weight, tensors["input_scale"].item(), tensors.get("bias"))
