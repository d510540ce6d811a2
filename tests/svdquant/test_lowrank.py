"""Randomised low rank against the full singular value decomposition."""

import torch

from dcgen_convert.svdquant.lowrank import low_rank


def heavy(n=384, k=640, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator)).Q,
        torch.linalg.qr(torch.randn(k, n, generator=generator)).Q,
    )
    return left @ torch.diag(torch.arange(1, n + 1).float() ** -0.6) @ right.T


def generator():
    return torch.Generator().manual_seed(1)


def optimum(matrix, rank):
    return torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt().item()


def test_residual_is_within_a_permille_of_the_optimum():
    matrix = heavy()
    up, down, _ = low_rank(matrix, 32, generator())
    assert up.shape == (384, 32) and down.shape == (32, 640)
    assert (matrix - up @ down).norm().item() <= 1.001 * optimum(matrix, 32)


def test_warm_start_needs_one_iteration():
    matrix = heavy()
    _, _, basis = low_rank(matrix, 32, generator())
    nearby = matrix * (1 + 0.05 * torch.rand(640, generator=generator()))
    up, down, _ = low_rank(nearby, 32, generator(), iterations=1, start=basis)
    assert (nearby - up @ down).norm().item() <= 1.01 * optimum(nearby, 32)


def test_same_seed_same_bits():
    first, second = low_rank(heavy(), 16, generator()), low_rank(heavy(), 16, generator())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_exact_when_the_rank_suffices():
    matrix = torch.randn(128, 12, generator=generator()) @ torch.randn(12, 256, generator=generator())
    up, down, _ = low_rank(matrix, 16, generator())
    assert torch.allclose(up @ down, matrix, atol=1e-4)


def test_refit_is_the_weighted_optimum():
    """||(E - U A) L||_F reaches the optimum of the weighted problem, which is the tail of the singular values of E
    L.
    """
    missed = heavy()
    x = torch.randn(2000, 640, generator=generator()) * torch.linspace(0.2, 3, 640)
    lower = torch.linalg.cholesky(x.T @ x / 2000)
    up, inner, _ = low_rank(missed, 32, generator(), lower=lower)
    assert ((missed - up @ inner) @ lower).norm().item() <= 1.001 * optimum(missed @ lower, 32)
