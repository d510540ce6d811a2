"""GPTQ: never worse than rounding on its own objective, equal to it without correlation, and equal to the textbook
recursion.
"""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dcgen_convert.svdquant.gptq import factor, gptq, shrink
from dcgen_convert.svdquant.weights import group_scales, round_to_nearest, search_factor, tensor_scale

from .reference import objective


def problem(seed, k=256, correlation=0.7):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(16, k, generator=generator)
    x = (1 - correlation) * torch.randn(600, k, generator=generator) + correlation * torch.randn(
        600, 16, generator=generator
    ) @ mixing / 4
    return torch.randn(128, k, generator=generator), x.T @ x / 600


@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_rounding_on_its_objective(precision, seed):
    weight, hessian = problem(seed)
    scale = tensor_scale(weight, precision)
    micro = group_scales(weight, precision, scale, search_factor(weight, precision, scale, hessian.diagonal()))
    plain = round_to_nearest(weight, micro, scale, precision).dequantise()
    better = gptq(weight, factor(hessian.clone()), micro, scale, precision).dequantise()
    assert objective(weight, better, hessian) < 0.7 * objective(weight, plain, hessian)


@settings(max_examples=30, deadline=None, phases=(Phase.generate,))
@given(st.integers(0, 2**31), st.sampled_from(["nvfp4", "int4"]), st.floats(-6, 0), st.integers(4, 600))
def test_never_worse_than_rounding_whatever_the_inputs(seed, precision, exponent, tokens):
    """Its objective is that of the damped Hessian. With next to no correlation rounding is as good, and luck
    decides.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(128) + 10**exponent * torch.randn(128, 128, generator=generator)
    x = torch.randn(tokens, 128, generator=generator) @ mixing
    hessian = mixing.T @ mixing if tokens > 300 else x.T @ x / tokens
    lower = factor(hessian)
    damped = (lower.double() @ lower.double().T).float()
    weight = torch.randn(128, 128, generator=generator)
    scale = tensor_scale(weight, precision)
    micro = group_scales(weight, precision, scale)
    plain = objective(weight, round_to_nearest(weight, micro, scale, precision).dequantise(), damped)
    assert objective(weight, gptq(weight, lower, micro, scale, precision).dequantise(), damped) <= plain * (1 + 1e-5)


def test_uncorrelated_inputs_give_rounding():
    weight, _ = problem(0)
    micro = group_scales(weight, "nvfp4", 0.01)
    hessian = torch.diag(torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.1)
    got = gptq(weight, factor(hessian.clone()), micro, 0.01, "nvfp4")
    assert torch.equal(got.grid, round_to_nearest(weight, micro, 0.01, "nvfp4").grid)


def textbook(weight, hessian, micro, damp=0.01):
    """GPTQ as published: columns last to first, the error spread over the open columns by the inverse of their Hessian
    (float64).
    """
    w = weight.double().clone()
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    out = torch.empty_like(w)
    for k in range(len(h) - 1, -1, -1):
        inverse = torch.linalg.inv(h[: k + 1, : k + 1])
        scale = micro[:, k // 64].double()
        out[:, k] = (w[:, k] / scale).round().clamp(-8, 7) * scale
        w[:, :k] -= torch.outer((w[:, k] - out[:, k]) / inverse[k, k], inverse[k, :k])
    return out


@pytest.mark.parametrize("k", [256, 192])
def test_equals_the_published_recursion(k):
    """Also for a number of channels that is no multiple of the blocks in which they are worked off."""
    weight, hessian = problem(3, k)
    micro = group_scales(weight, "int4", 1.0)
    got = gptq(weight, factor(hessian.clone()), micro, 1.0, "int4").dequantise().double()
    wanted = textbook(weight, hessian, micro)
    assert ((got - wanted).abs() > 1e-6).float().mean() < 0.01  # rounding ties apart, code for code
    assert objective(weight, got.float(), hessian) == pytest.approx(
        objective(weight, wanted.float(), hessian), rel=0.01
    )


def test_inputs_that_never_fire_do_not_break_the_factor():
    _, hessian = problem(4)
    hessian[7], hessian[:, 7] = 0, 0
    wanted = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256)  # the damping
    lower = factor(hessian.clone())
    assert torch.allclose(lower @ lower.T, wanted, atol=1e-4) and bool((lower.triu(1) == 0).all())
    assert torch.isfinite(factor(hessian.clone())).all()
    assert torch.isfinite(factor(torch.zeros(128, 128))).all()


def test_a_matrix_without_a_factor_is_reported_not_factored():
    assert factor(torch.diag(torch.linspace(-3, 1, 128))) is None


def test_nearly_singular_hessians_have_a_factor():
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0)) + 5  # eight tokens, one direction dominates
    hessian = 1e4 * x.T @ x
    lower = factor(hessian.clone())
    assert lower is not None
    assert (lower @ lower.T - hessian).norm() < 0.02 * hessian.norm()


def test_shrinkage_removes_correlations_that_are_only_noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 256, generator=generator) * torch.linspace(0.5, 2, 256)
    sampled = x.T @ x / 300
    shrunk = shrink(sampled.clone(), 300)
    assert torch.equal(shrunk.diagonal(), sampled.diagonal())
    truth = torch.diag(torch.linspace(0.5, 2, 256).square())
    assert (shrunk - truth).norm() < 0.4 * (sampled - truth).norm()
    _, correlated = problem(0)
    assert (shrink(correlated.clone(), 600) - correlated).norm() < 0.1 * correlated.norm()
