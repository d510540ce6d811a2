"""Streamed normal equations against dense least squares in float64 and brute force."""

import pretend_device
import pytest
import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.train.ridge import NormalEquations

K, D, ROWS = 7, 5, 400
DEVICE_SHAPES = (128, 128), (128,), (128, 4)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, K, generator=generator) + 0.7
    y = x @ torch.randn(K, D, generator=generator) + 0.3 * torch.randn(ROWS, D, generator=generator) - 1.5
    return x, y


def stream(x, y, parts=7):
    equations = NormalEquations(K, D)
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        equations.add(a, b)
    return equations


def test_solution_is_the_float64_least_squares_optimum(rows):
    x, y = rows
    weight, bias = stream(x, y).solve(0.0)
    design = torch.cat([x, torch.ones(ROWS, 1)], 1).double()
    best = torch.linalg.lstsq(design, y.double()).solution
    torch.testing.assert_close(weight, best[:K].T, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(bias, best[K], atol=1e-8, rtol=1e-8)


def test_equations_of_two_sets_of_rows_add_up(rows):
    x, y = rows
    both = stream(x[:150], y[:150]) + stream(x[150:], y[150:])
    assert both.count == ROWS
    for mine, one in zip(both.solve(1e-6), stream(x, y).solve(1e-6), strict=True):
        torch.testing.assert_close(mine, one, atol=1e-12, rtol=1e-10)


def test_a_weight_counts_a_row_so_often(rows):
    x, y = rows
    weight = torch.randint(0, 4, (ROWS,), generator=torch.Generator().manual_seed(1))
    weighted = NormalEquations(K, D)
    for part in zip(x.chunk(3), y.chunk(3), weight.chunk(3), strict=True):
        weighted.add(*part)
    again = stream(x.repeat_interleave(weight, 0), y.repeat_interleave(weight, 0))
    assert weighted.count == again.count
    for mine, one in zip(weighted.solve(1e-6), again.solve(1e-6), strict=True):
        torch.testing.assert_close(mine, one, atol=1e-10, rtol=1e-10)
    guess = torch.randn(D, K), torch.randn(D)
    assert weighted.mse(*guess) == pytest.approx(again.mse(*guess), rel=1e-9)


def test_without_a_bias_it_is_the_optimum_through_the_origin(rows):
    x, y = rows
    weight, bias = stream(x, y).solve(0.0, bias=False)
    torch.testing.assert_close(weight, torch.linalg.lstsq(x.double(), y.double()).solution.T, atol=1e-8, rtol=1e-8)
    assert not bias.any()


def test_mse_without_the_rows_is_the_mse_on_the_rows(rows):
    x, y = rows
    weight, bias = torch.randn(D, K), torch.randn(D)
    direct = (x.double() @ weight.double().T + bias.double() - y.double()).square().mean().item()
    assert stream(x, y).mse(weight, bias) == pytest.approx(direct, rel=1e-9)


def test_ridge_shrinks_towards_the_mean(rows):
    x, y = rows
    weight, bias = stream(x, y).solve(1e9)
    assert weight.abs().max() < 1e-6
    torch.testing.assert_close(bias, y.double().mean(0), atol=1e-5, rtol=1e-5)


def test_no_rows_and_nan_rows_are_refused(rows):
    with pytest.raises(InputError):
        NormalEquations(K, D).solve(0.0)
    x, y = rows
    x[3, 2] = float("nan")
    with pytest.raises(InputError):
        stream(x, y).solve(0.0)


@pytest.mark.parametrize("mean", [0.0, 1.0, 10.0])
def test_features_that_are_nearly_collinear_are_solved_on_a_device_as_in_float64(mean):
    """128 features whose covariance has condition 1e8, far from zero: the loss on other rows against a dense solver on
    the CPU, to 1e-6. Products in float32, summed in float64, miss it by more than a tenth when the mean is not 0.
    """
    rotation, shift, truth = (torch.randn(size, generator=torch.Generator().manual_seed(3)) for size in DEVICE_SHAPES)
    generator = torch.Generator().manual_seed(4)

    def rows(count):
        factors = torch.randn(count, 128, generator=generator)
        x = (factors * torch.logspace(0, -4, 128)) @ torch.linalg.qr(rotation)[0] + mean * shift
        return x, factors @ truth / 128**0.5 + torch.randn(count, 4, generator=generator)

    (x, y), others = rows(8192), NormalEquations(128, 4)
    others.add(*rows(4096))
    with pretend_device.ready() as device:
        equations = NormalEquations(128, 4, device)
        for part in zip(x.split(1024), y.split(1024), strict=True):
            equations.add(*(value.to(device) for value in part))
        there = NormalEquations.of(equations.tensors())
    centred, offset = x.double() - x.double().mean(0), y.double().mean(0)
    ridge = 1e-6 * centred.square().mean()
    design = torch.cat([centred, (len(x) * ridge) ** 0.5 * torch.eye(128)])
    weight = torch.linalg.lstsq(design, torch.cat([y.double() - offset, torch.zeros(128, 4)])).solution.T
    best = others.mse(weight, offset - weight @ x.double().mean(0))
    assert others.mse(*there.solve(1e-6)) == pytest.approx(best, rel=1e-6)
    if mean:
        there.xx = sum((part.T @ part).double() for part in x.split(1024))
        there.xy = sum((a.T @ b).double() for a, b in zip(x.split(1024), y.split(1024), strict=True))
        assert others.mse(*there.solve(1e-6)) > 1.1 * best
