"""The activation quantiser against a scalar transcription of the kernel (nunchaku's file format), and its known
range.
"""

import numpy as np
import pytest
import torch

from dcgen_convert.svdquant.activation import quantize_activation

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def bf16(value) -> np.float32:
    return np.float32(torch.tensor(float(value)).to(torch.bfloat16).item())


def e4m3(value) -> np.float32:
    return np.float32(torch.tensor(min(float(value), 448.0)).to(torch.float8_e4m3fn).item())


def scalar(xs: list[float], smooth: list[float], precision: str) -> list[float]:
    """One group, number by number, in float32."""
    half = [bf16(np.float32(bf16(x)) / np.float32(s)) for x, s in zip(xs, smooth, strict=True)]
    amax = max(abs(h) for h in half)
    if amax == 0:
        return [0.0] * len(xs)
    scale = (
        min(np.float32(amax) / np.float32(6), np.float32(448))
        if precision == "nvfp4"
        else np.float32(amax) / np.float32(7)
    )
    reciprocal = np.float32(1) / np.float32(scale)
    out = []
    for h in half:
        wanted = np.float32(h) * reciprocal
        if precision == "nvfp4":
            distances = np.abs(E2M1 - np.abs(wanted))
            near = np.flatnonzero(distances == distances.min())
            code = min(near, key=lambda index: index % 2)
            out.append(float(np.sign(wanted) * E2M1[code] * e4m3(scale)))
        else:
            out.append(float(np.clip(np.rint(wanted), -8, 7) * bf16(scale)))
    return out


@pytest.mark.parametrize("precision, group", [("nvfp4", 16), ("int4", 64)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-4, 3e3])
def test_matches_the_kernel_number_by_number(precision, group, magnitude):
    generator = torch.Generator().manual_seed(0)
    x = magnitude * torch.randn(5, 2 * group, generator=generator)
    x[0, :group] = 0
    smooth = torch.rand(2 * group, generator=generator).add(0.5).to(torch.bfloat16).float()
    got = quantize_activation(x, smooth, precision)
    for row in range(5):
        for start in (0, group):
            part = slice(start, start + group)
            wanted = scalar(x[row, part].tolist(), smooth[part].tolist(), precision)
            assert got[row, part].tolist() == pytest.approx(wanted, rel=1e-6, abs=0)


def test_a_group_maximum_returns_as_six_times_the_rounded_scale():
    x = torch.zeros(1, 16)
    x[0, 3] = 7.0  # 7 / 6 = 1.1667 -> e4m3 1.125
    assert quantize_activation(x, None, "nvfp4")[0, 3].item() == 6 * 1.125


def test_small_activations_underflow_the_fp8_scale():
    """The trap that the normalisation of smoothing factors avoids: flat over 2^-3 .. 2^7, useless at 2^-10 (Part
    I.2).
    """
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).float()

    def error(scale):
        return ((quantize_activation(x * scale, None, "nvfp4") - x * scale).norm() / (x * scale).norm()).item()

    assert error(1.0) == pytest.approx(0.098, abs=0.002)  # normally distributed
    assert error(2.0**7) == pytest.approx(error(1.0), abs=0.002) == error(2.0**-3)
    assert error(2.0**-10) > 0.9
