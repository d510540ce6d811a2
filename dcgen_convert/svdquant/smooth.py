"""Per-channel smoothing, searched with the quantisers that the kernels use (SVDQuant, arXiv 2411.05007, section 4.2).

s_k = x_k^alpha / w_k^beta with x_k, w_k the abs-max of input channel k and of weight column k. x is divided by s, W
multiplied. T tokens, N out channels, K in channels.
"""

from dataclasses import dataclass

import torch

from dcgen_convert.core import pulse
from dcgen_convert.svdquant.activation import quantize_activation
from dcgen_convert.svdquant.formats import round_bf16
from dcgen_convert.svdquant.lowrank import low_rank
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.weights import group_scales, round_to_nearest, tensor_scale

COARSE = tuple((a / 10, 0.0) for a in range(1, 10))  # the half of the grid that wins almost always
MIXED = tuple((a / 10, 1 - a / 10) for a in range(1, 10))
SCORE_ROWS = 512  # candidates are compared on this many output channels


@dataclass
class Smoothing:
    """A chosen smoothing: s (K,) as the file keeps it (bfloat16 values), its exponents, its score, and how many were
    compared.
    """

    factor: torch.Tensor
    alpha: float
    beta: float
    error: float
    tried: int


def search(
    weight: torch.Tensor, amax: torch.Tensor, tokens: torch.Tensor, settings: QuantSettings, generator: torch.Generator
) -> Smoothing:
    """The candidate with the least relative error of the layer's output on `tokens` (T, K), low-rank branch included.

    Order: identity; beta = 0; beta = 1 - alpha; then half steps on both sides of the best one. The search for the
    low-rank subspace of a candidate starts from that of the candidate before.
    """
    scorer = _Scorer(weight, tokens, settings, generator)
    column = weight.abs().amax(0)
    found: dict[tuple[float, float], tuple[float, torch.Tensor]] = {}

    def try_out(alpha: float, beta: float) -> None:
        if (alpha, beta) not in found:
            pulse.bump()
            factor = candidate(amax, column, tokens, alpha, beta)
            found[alpha, beta] = (scorer.error(factor), factor)

    for alpha, beta in ((0.0, 0.0), *COARSE, *MIXED):
        try_out(alpha, beta)
    best = min(found, key=lambda key: found[key][0])
    if best != (0.0, 0.0):
        for step in (-0.05, 0.05):
            alpha = round(best[0] + step, 2)
            try_out(alpha, round(1 - alpha, 2) if best[1] else 0.0)
    best = min(found, key=lambda key: found[key][0])
    return Smoothing(found[best][1], *best, found[best][0], len(found))


def candidate(
    amax: torch.Tensor, column: torch.Tensor, tokens: torch.Tensor, alpha: float, beta: float
) -> torch.Tensor:
    """s (K,) in bfloat16 values, scaled by a power of two to rms(tokens / s) in [0.7, 1.4].

    The format has no scale for a whole activation tensor, so x / s itself must lie inside the range of e4m3 (nunchaku's
    file format). Because the factor is a power of two, s of alpha = beta = 0 scales exactly. A channel that is always
    zero gets the mean of the other channels' logarithms.
    """
    log = alpha * _safe_log(amax) - beta * _safe_log(column)
    factor = (log - log.mean()).exp()
    rms = (tokens / factor).square().mean().sqrt().clamp(min=1e-30)
    return round_bf16(factor * torch.exp2(torch.log2(rms).round()))


def _safe_log(x: torch.Tensor) -> torch.Tensor:
    """log x, with the mean of the other logarithms where x is zero. Limits keep every channel within a factor of 1e5
    of that mean.
    """
    alive = x > 0
    if not bool(alive.any()):
        return torch.zeros_like(x)
    log = x.clamp(min=1e-30).log()
    mean = log[alive].mean()
    return torch.where(alive, log, mean).clamp(mean - 11.5, mean + 11.5)


class _Scorer:
    """Relative output error of smooth + low rank + round-to-nearest for one layer, on fixed tokens and output rows."""

    def __init__(self, weight: torch.Tensor, tokens: torch.Tensor, settings: QuantSettings, generator: torch.Generator):
        self.weight, self.tokens, self.settings, self.generator = weight, tokens, settings, generator
        rows = torch.randperm(weight.shape[0], generator=generator)[:SCORE_ROWS].sort().values.to(weight.device)
        self.rows = rows
        self.wanted = tokens @ weight[rows].T  # (T, rows)
        self.basis: torch.Tensor | None = None

    def error(self, factor: torch.Tensor) -> float:
        settings = self.settings
        smoothed = self.weight * factor
        up, down, self.basis = low_rank(
            smoothed, settings.rank, self.generator, 2 if self.basis is None else 1, self.basis
        )
        residual = smoothed[self.rows].addmm_(up[self.rows], down, alpha=-1)
        scale = tensor_scale(residual, settings.precision)
        quantised = round_to_nearest(
            residual, group_scales(residual, settings.precision, scale), scale, settings.precision
        )
        xq = quantize_activation(self.tokens, factor, settings.precision)
        got = xq @ quantised.dequantise().T + ((self.tokens / factor) @ down.T) @ up[self.rows].T
        return ((got - self.wanted).norm() / self.wanted.norm().clamp(min=1e-30)).item()
