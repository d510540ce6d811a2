"""What the kernels do to the input of a W4A4 linear (nunchaku's file format): dynamic, per token and group, no
calibration data.

T tokens, K channels. Values are float32 and carry exactly what the 4-bit codes times their stored scale mean.
"""

import torch

from dcgen_convert.svdquant.formats import E2M1_MAX, E4M3_MAX, round_bf16, round_e2m1, round_e4m3, round_int4


def quantize_activation(x: torch.Tensor, smooth: torch.Tensor | None, precision: str) -> torch.Tensor:
    """x (T, K) as the tensor cores see it: half(x / smooth), quantised and dequantised. Half is bfloat16.

    smooth (K,) or None for ones. nvfp4: the codes are made with the reciprocal of the scale *before* it is rounded, and
    the product uses the e4m3 scale. So the maximum of a group becomes 6 * e4m3(amax / 6). int4: the same with amax / 7
    in bfloat16. A group of zeros gives zeros.
    """
    xs = round_bf16(x.float() if smooth is None else round_bf16(x.float()) / smooth)
    return _nvfp4(xs) if precision == "nvfp4" else _int4(xs)


def quantize_scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x (T, K) as FlashInfer's `nvfp4_quantize` rounds it: bfloat16, codes e2m1, e4m3 scales of 16 channels times
    ``scale``. Here the codes are made with the rounded scale. What exceeds 448 * 6 * scale is cut off.

    Source: flashinfer 0.6, cvt_warp_fp16_to_fp4; its two approximate reciprocals are exact here.
    """
    xs = round_bf16(x.float())
    groups = xs.view(*xs.shape[:-1], -1, 16)  # (T, K/16, 16)
    step = round_e4m3(groups.abs().amax(-1, keepdim=True) / E2M1_MAX / scale) * scale
    return (round_e2m1(torch.where(step > 0, groups / step, 0.0)) * step).view_as(xs)


def _nvfp4(xs: torch.Tensor) -> torch.Tensor:
    groups = xs.view(*xs.shape[:-1], -1, 16)  # (T, K/16, 16)
    scale = (groups.abs().amax(-1, keepdim=True) / E2M1_MAX).clamp(max=E4M3_MAX)
    codes = round_e2m1(torch.where(scale > 0, groups * (1 / scale), 0.0))
    return (codes * round_e4m3(scale)).view_as(xs)


def _int4(xs: torch.Tensor) -> torch.Tensor:
    groups = xs.view(*xs.shape[:-1], -1, 64)  # (T, K/64, 64)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    codes = round_int4(torch.where(scale > 0, groups * (1 / scale), 0.0))
    return (codes * round_bf16(scale)).view_as(xs)
