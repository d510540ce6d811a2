"""The kernel distance of two sets of features that CMMD is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from dcgen_convert.evaluation.metrics import require_sets

SIGMA = 10.0  # width of the kernel
SCALE = 1000.0


def cmmd(a: Tensor, b: Tensor) -> float:
    """Maximum mean discrepancy of two sets of features, (N, D) and (M, D), scaled for people to read.

    Each row is brought to length 1. The kernel is exp(-|x - y|^2 / (2 SIGMA^2)), and the mean over all pairs takes a
    row with itself too (the biased estimator), so that a set and itself have 0 (Jayasumana et al., arXiv 2401.09603).
    It needs fewer pictures than a Frechet distance, as no covariance is fitted.

    Raises:
        InputError: fewer than two rows, rows of different lengths, or features that are not finite.
    """
    require_sets(a, b)
    a, b = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (a, b))
    return max(0.0, SCALE * (_mean(a, a) + _mean(b, b) - 2 * _mean(a, b)))


def _mean(a: Tensor, b: Tensor) -> float:
    """Mean of the kernel over all pairs of rows of length 1; few rows of the table of pairs are in memory at a time."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for part in a.split(1024):
        square = (part.square().sum(1)[:, None] + b.square().sum(1) - 2 * part @ b.T).clamp_min(0)
        total += (-square / (2 * SIGMA**2)).exp().sum()
    return total.item() / (len(a) * len(b))
