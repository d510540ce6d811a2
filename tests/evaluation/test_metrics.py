"""PSNR and the Frechet distance against closed forms and scipy-free references."""

import math

import pytest
import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation.metrics import frechet, psnr


def test_psnr_of_a_known_error():
    a = torch.zeros(3, 8, 8)
    assert psnr(a, a + 0.1) == pytest.approx(20.0)
    assert psnr(a, a + 25.5, peak=255) == pytest.approx(20.0)
    assert psnr(a, a) == math.inf
    with pytest.raises(InputError):
        psnr(a, torch.zeros(3, 8, 9))


def exact(n: int, mean, covariance) -> torch.Tensor:
    """(n, D) samples whose mean and unbiased covariance are exactly the given ones."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(n, len(mean), generator=generator, dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T)).T)
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_gaussians_with_commuting_covariances():
    """|mu|^2 + sum (sqrt s_a - sqrt s_b)^2 when both covariances are diagonal."""
    a = exact(50, torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()))
    b = exact(70, torch.tensor([1.0, 0.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0]).double()))
    assert frechet(a, b) == pytest.approx(5 + 1 + 0 + 4, abs=1e-9)
    assert frechet(b, a) == pytest.approx(10, abs=1e-9) and frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_general_covariances_against_the_eigenvalues_of_the_product():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(200, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    b = (
        torch.randn(200, 6, generator=generator, dtype=torch.float64)
        @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
        + 1
    )
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    assert frechet(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_low_rank_covariances_and_float32_features():
    features = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    assert frechet(features, features) == pytest.approx(0, abs=1e-5)
    assert frechet(features, features + 3) == pytest.approx(9 * 40, rel=1e-5)
    assert frechet(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [2.0]])) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 3), torch.zeros(4), torch.zeros(4, 2), torch.full((4, 3), float("nan"))]
)
def test_features_that_give_no_distance(bad):
    with pytest.raises(InputError):
        frechet(torch.randn(8, 3), bad)
