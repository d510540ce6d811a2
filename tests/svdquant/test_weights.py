"""Weight rounding, group scales and the affine W4A16 quantiser against brute force."""

import pytest
import torch

from dcgen_convert.svdquant.awq import quantize_awq
from dcgen_convert.svdquant.formats import E2M1, round_e4m3
from dcgen_convert.svdquant.weights import QuantWeight, group_scales, round_to_nearest, search_factor, tensor_scale


def weight(n=128, k=256, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize(
    "precision, levels", [("nvfp4", [s * v for v in E2M1 for s in (1, -1)]), ("int4", list(range(-8, 8)))]
)
def test_round_to_nearest_is_the_nearest_level(precision, levels):
    w = weight()
    scale = tensor_scale(w, precision)
    micro = group_scales(w, precision, scale)
    got = round_to_nearest(w, micro, scale, precision).dequantise()
    group = w.shape[1] // micro.shape[1]
    every = micro.repeat_interleave(group, 1).unsqueeze(-1) * scale * torch.tensor(levels, dtype=torch.float32)
    best = (every - w.unsqueeze(-1)).abs().amin(-1)
    assert torch.allclose((got - w).abs(), best, atol=1e-9)


def test_scales_are_what_the_file_can_hold():
    w = weight()
    scale = tensor_scale(w, "nvfp4")
    micro = group_scales(w, "nvfp4", scale)
    assert torch.tensor(scale).to(torch.bfloat16).item() == scale
    assert torch.equal(round_e4m3(micro), micro) and micro.max() <= 448 and micro.min() > 0
    wide = group_scales(w, "int4", 1.0)
    assert torch.equal(wide.to(torch.bfloat16).float(), wide)


@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
def test_searched_scales_are_never_worse_in_any_group(precision):
    w, importance = weight(), torch.rand(256, generator=torch.Generator().manual_seed(1))
    scale = tensor_scale(w, precision)
    group = 16 if precision == "nvfp4" else 64

    def errors(search):
        factor = search_factor(w, precision, scale, importance) if search else None
        micro = group_scales(w, precision, scale, factor)
        difference = (round_to_nearest(w, micro, scale, precision).dequantise() - w).square() * importance
        return difference.view(128, -1, group).sum(-1)

    searched, plain = errors(True), errors(False)
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < 0.97 * plain.sum()


def test_zero_weight_and_zero_group():
    w = torch.zeros(128, 128)
    for precision in ("nvfp4", "int4"):
        scale = tensor_scale(w, precision)
        assert round_to_nearest(w, group_scales(w, precision, scale), scale, precision).dequantise().abs().max() == 0


@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
def test_codes_round_trip(precision):
    w = weight()
    scale = tensor_scale(w, precision)
    quantised = round_to_nearest(w, group_scales(w, precision, scale), scale, precision)
    again = QuantWeight.from_codes(quantised.codes(), quantised.micro, scale, precision)
    assert torch.equal(again.dequantise(), quantised.dequantise())


def test_awq_is_affine_and_no_worse_than_min_max():
    w = weight(136, 192) + 0.05  # off centre: a symmetric format would waste half its codes
    layer = quantize_awq("m", w, torch.zeros(136))
    groups = w.view(136, 3, 64)
    low, step = groups.amin(-1, keepdim=True), (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    plain = (((groups - low) / step).round() * step + low - groups).square().sum(-1)
    mine = (layer.dense() - w).view(136, 3, 64).square().sum(-1)
    assert (mine <= 1.3 * plain).all()  # bfloat16 scales, zeros and products cost a little
    assert mine.sum() < plain.sum()
    assert layer.codes.max() <= 15 and layer.bias.dtype == torch.bfloat16
