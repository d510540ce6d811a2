"""W4A16 layers: what the codes stand for, and no worse than the symmetric scale that other tools write."""

import torch

from dcgen_convert.svdquant.awq import quantize_awq


def modulation(seed: int, shift: float) -> torch.Tensor:
    """A weight whose groups of 64 are off centre by `shift` standard deviations, as those of AdaLN layers are."""
    generator = torch.Generator().manual_seed(seed)
    offset = shift * torch.randn(128, 4, 1, generator=generator)
    return 0.02 * (torch.randn(128, 4, 64, generator=generator) + offset).reshape(128, 256)


def symmetric(weight: torch.Tensor) -> torch.Tensor:
    """Abs-max / 7 in bfloat16, codes 0 .. 14 around 7: wzeros = -7 wscales."""
    groups = weight.view(128, 4, 64)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16).float()
    return ((groups / scale).round().clamp(-7, 7) * scale).view_as(weight)


def error(got: torch.Tensor, weight: torch.Tensor) -> float:
    return ((got - weight).norm() / weight.norm()).item()


def test_affine_and_clipped_beats_symmetric():
    for seed in range(3):
        centred, off = modulation(seed, 0.0), modulation(seed, 1.5)
        ours = [quantize_awq("m", weight, None).dense() for weight in (centred, off)]
        assert error(ours[0], centred) < 0.9 * error(symmetric(centred), centred)
        assert error(ours[1], off) < 0.75 * error(symmetric(off), off)


def test_no_worse_than_plain_min_max_in_any_group():
    weight = modulation(7, 1.0)
    groups = weight.view(128, 4, 64)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).to(torch.bfloat16).float()
    zero = ((low + high) / 2 - (high - low) / 2).to(torch.bfloat16).float()
    plain = (((groups - zero) / scale).round().clamp(0, 15) * scale + zero).to(torch.bfloat16).float()
    layer = quantize_awq("m", weight, None)
    got = layer.dense().view_as(groups)
    wanted = (plain - groups).square().sum(-1)
    assert ((got - groups).square().sum(-1) <= wanted * (1 + 1e-4)).all()
    assert layer.record["weight_error"] == error(layer.dense(), weight)


def test_every_value_is_a_code_times_scale_plus_zero():
    layer = quantize_awq("m", modulation(1, 1.0), torch.ones(128))
    assert layer.codes.dtype == torch.uint8 and layer.codes.max() <= 15
    for row, column in ((0, 0), (17, 63), (17, 64), (127, 255)):
        scale, zero = layer.scales[row, column // 64], layer.zeros[row, column // 64]
        wanted = (layer.codes[row, column].float() * scale + zero).to(torch.bfloat16).float()
        assert layer.dense()[row, column] == wanted
    for values in (layer.scales, layer.zeros, layer.bias):
        assert torch.equal(values.to(torch.bfloat16).float(), values.float())
