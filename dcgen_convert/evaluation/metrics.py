"""Distances between pictures and between sets of pictures, computed in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dcgen_convert.core.errors import InputError


def psnr(a: Tensor, b: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of two tensors of one shape; infinity when they are equal.

    ``peak`` is the largest value minus the smallest value that a pixel can have.
    """
    if a.shape != b.shape:
        raise InputError(f"PSNR compares pictures of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def psnr_of(pairs: Iterable[tuple[Tensor, Tensor]], peak: float = 1.0) -> float:
    """`psnr` over all pictures of ``pairs``, which come one after the other and are not kept."""
    square, count = 0.0, 0
    for a, b in pairs:
        square, count = square + (a - b).square().sum(dtype=torch.float64).item(), count + a.numel()
    return math.inf if square == 0 else 10 * math.log10(peak**2 * count / square)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, (N, D) and (M, D).

    It is |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) with unbiased covariances (Heusel et al., arXiv 1706.08500,
    eq. 6). tr (S_a S_b)^1/2 is computed as the sum of the square roots of the eigenvalues of S_a^1/2 S_b S_a^1/2. This
    matrix is symmetric, so no square root is complex, and covariances of low rank (fewer samples than features) do no
    harm.

    Raises:
        InputError: fewer than two samples, features of different lengths, or features that are not finite.
    """
    require_sets(a, b)
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(features.T)) for features in (a, b))  # (D, D)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


def require_sets(a: Tensor, b: Tensor) -> None:
    """InputError unless ``a`` and ``b`` are sets of features of one length, (N, D) and (M, D), that are finite."""
    for features in (a, b):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != a.shape[-1]:
            raise InputError(f"features must be (N >= 2, D) with one D, got {tuple(a.shape)} and {tuple(b.shape)}")
        if not torch.isfinite(features).all():
            raise InputError("features hold NaN or infinity")
