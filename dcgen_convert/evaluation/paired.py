"""Differences between two models on the same prompts and seeds, with an interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dcgen_convert.core.errors import InputError

RESAMPLES = 1000
SURE = 0.95  # share of the resampled differences that lie in the interval
SEED = 20_240_109


@dataclass(frozen=True)
class Paired:
    """The mean of ``b - a`` over pairs of scores.

    Attributes:
        mean_a, mean_b: means over the pairs that count.
        difference: mean of b - a.
        low, high: 95 % interval of the difference.
        pairs: how many pairs count.
        dropped: pairs of which a score was NaN.
    """

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    pairs: int
    dropped: int

    @property
    def decided(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def compare(a: Tensor, b: Tensor, seed: int = SEED) -> Paired:
    """The difference of two models' scores, (N,) each, in which row i of both is the same prompt and seed.

    The interval is a percentile bootstrap (Efron 1979): RESAMPLES times, N pairs are drawn with replacement, and the
    interval goes from the 2.5th to the 97.5th percentile of their mean differences. It speaks of the choice of prompts
    and seeds, and not of another training.

    Raises:
        InputError: the scores are not as many, or no pair is left.
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise InputError(f"paired scores must be (N,) twice, got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double().cpu(), b.double().cpu()
    kept = ~(a.isnan() | b.isnan())
    a, b = a[kept], b[kept]
    if not len(a):
        raise InputError("no pair of scores can be compared: each has a picture to which the measure does not apply")
    difference = b - a
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [difference[torch.randint(len(a), (len(a),), generator=generator)].mean() for _ in range(RESAMPLES)]
    )
    edges = torch.tensor([(1 - SURE) / 2, (1 + SURE) / 2], dtype=torch.float64)
    low, high = means.quantile(edges).tolist()
    dropped = int((~kept).sum())
    return Paired(a.mean().item(), b.mean().item(), difference.mean().item(), low, high, len(a), dropped)
