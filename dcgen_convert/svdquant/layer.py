"""One linear layer, start to finish: smoothing -> low rank -> 4-bit residual -> refit -> what the file keeps.

y = W x + b with W (N, K). The result satisfies W ~= R diag(1/s) + U D, R 4-bit, s the smoothing, U (N, R) and D (R, K)
bfloat16 acting on x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from dcgen_convert.core import pulse
from dcgen_convert.core.errors import CheckFailed
from dcgen_convert.svdquant.activation import quantize_activation
from dcgen_convert.svdquant.checks import check_finite, check_svdq_shape
from dcgen_convert.svdquant.gptq import factor, gptq, shrink
from dcgen_convert.svdquant.lowrank import low_rank
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.smooth import Smoothing, search
from dcgen_convert.svdquant.stats import Stats
from dcgen_convert.svdquant.weights import QuantWeight, group_scales, round_to_nearest, search_factor, tensor_scale

REFITS = 2  # the low-rank branch is fitted again to what the 4-bit weight missed; each refit costs one more GPTQ pass


class Rounded(Protocol):
    """A layer after its quantisation."""

    def dense(self) -> torch.Tensor:
        """float32 (N, K): the weight that it stands for."""

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """y - b for tokens x (T, K), with the rounding of its inputs."""


@dataclass
class SvdqLinear:
    """The decomposition of one layer. Every tensor already holds the values that the file will hold."""

    quantised: QuantWeight  # R, acts on x / smooth
    smooth: torch.Tensor  # (K,) float32 with bfloat16 values
    up: torch.Tensor  # U (N, R) bfloat16
    down: torch.Tensor  # D (R, K) bfloat16
    bias: torch.Tensor | None  # (N,) bfloat16
    record: dict[str, Any] = field(default_factory=dict)

    def rows(self, start: int, stop: int, bias: torch.Tensor | None) -> SvdqLinear:
        """Output channels start .. stop as a layer of their own, with their bias."""
        weight, rows = self.quantised, slice(start, stop)
        part = QuantWeight(weight.grid[rows], weight.micro[rows], weight.tensor_scale, weight.precision)
        bias = None if bias is None else bias.to(torch.bfloat16)
        return SvdqLinear(part, self.smooth, self.up[rows], self.down, bias)

    def dense(self) -> torch.Tensor:
        """R diag(1/s) + U D, float32 (N, K): the weight that the layer stands for."""
        return self.quantised.dequantise() / self.smooth + self.up.float() @ self.down.float()

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """y - b for tokens x (T, K), with the kernel's activation quantisation, accumulated in float32."""
        xq = quantize_activation(x, self.smooth, self.quantised.precision)
        return xq @ self.quantised.dequantise().T + (x @ self.down.float().T) @ self.up.float().T


def quantize_linears(
    names: list[str],
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    stats: Stats | None,
    settings: QuantSettings,
    generator: torch.Generator,
) -> list[SvdqLinear]:
    """Quantise layers that read the same input, one or several; several share smoothing and down projection.

    `stats` None means data-free: no smoothing, and rounding to nearest with searched scales. The first version and its
    refits are compared on the choosing tokens, and the one with the least error is kept. A record gives alpha, beta,
    and two relative output errors on tokens that took no part in choosing: that of rounding W4A4 to nearest, and that
    of the result.
    Errors: InputError by name for shapes that the format cannot hold, and for NaN or infinite values.
    """
    for name, weight, bias in zip(names, weights, biases, strict=True):
        check_svdq_shape(name, tuple(weight.shape))
        check_finite(f"{name}.weight", weight)
        if bias is not None:
            check_finite(f"{name}.bias", bias)
    together = torch.cat([weight.to(settings.device).float() for weight in weights])
    tokens = None if stats is None else stats.tokens.to(settings.device)
    smoothing = _choose_smoothing(together, stats, tokens, settings, generator)
    joint = _decompose(together, stats, tokens, smoothing, settings, generator)
    rounded = partial(quantize_activation, smooth=None, precision=settings.precision)
    layers, start = [], 0
    for name, weight, bias in zip(names, weights, biases, strict=True):
        layer = joint.rows(start, start + weight.shape[0], bias)
        layer.record = {
            "module": name,
            "format": settings.precision,
            "shape": list(weight.shape),
            "rank": settings.rank,
            "alpha": smoothing.alpha,
            "beta": smoothing.beta,
            "candidates": smoothing.tried,
            "refits": joint.record["refits"],
        } | errors(together[start : start + weight.shape[0]], tokens, layer, settings.precision, rounded)
        layers.append(layer)
        start += weight.shape[0]
    return layers


def _choose_smoothing(
    weight: torch.Tensor,
    stats: Stats | None,
    tokens: torch.Tensor | None,
    settings: QuantSettings,
    generator: torch.Generator,
) -> Smoothing:
    """The searched smoothing, or ones."""
    if stats is None or tokens is None or not bool(tokens.any()):
        return Smoothing(torch.ones(weight.shape[1], device=weight.device), 0.0, 0.0, float("nan"), 1)
    return search(weight, stats.amax.to(weight.device), _for_choosing(tokens), settings, generator)


def _decompose(
    weight: torch.Tensor,
    stats: Stats | None,
    tokens: torch.Tensor | None,
    smoothing: Smoothing,
    settings: QuantSettings,
    generator: torch.Generator,
) -> SvdqLinear:
    smooth = smoothing.factor  # weight * smooth (N, K) acts on x / s; it is made anew where it is needed, not kept
    importance, lower = (None, None) if stats is None else input_metric(stats, smooth)
    up, inner, _ = low_rank(weight * smooth, settings.rank, generator)
    best, best_error = None, float("inf")
    for refit in range(REFITS + 1):
        pulse.bump()
        up, down = up.to(torch.bfloat16), (inner / smooth).to(torch.bfloat16)
        residual = (weight * smooth).sub_(up.float() @ (down.float() * smooth))  # absorbs the rounding of U and D
        scale = tensor_scale(residual, settings.precision)
        factors = search_factor(residual, settings.precision, scale, importance)
        micro = group_scales(residual, settings.precision, scale, factors)
        if lower is None:
            quantised = round_to_nearest(residual, micro, scale, settings.precision)
        else:
            quantised = gptq(residual, lower, micro, scale, settings.precision)
        del residual
        layer = SvdqLinear(quantised, smooth, up, down, None, {"refits": refit})
        error = _score(weight, tokens, layer)
        if best is None or error < best_error:
            best, best_error = layer, error
        if refit < REFITS:
            missed = (weight * smooth).sub_(quantised.dequantise())
            up, inner, _ = low_rank(missed, settings.rank, generator, lower=lower)
    assert best is not None
    return best


def input_metric(stats: Stats, smooth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean square of x / smooth per channel (K,), Cholesky factor of its Hessian (K, K))."""
    hessian = shrink(stats.hessian(smooth), stats.count)
    importance = hessian.diagonal().clone()
    lower = factor(hessian)
    if lower is None:
        hint = "Check the calibration pictures, or use --calibration none."
        raise CheckFailed(f"{stats.name}: its Hessian has no Cholesky factor.", hint)
    return importance, lower


def _score(weight: torch.Tensor, tokens: torch.Tensor | None, layer: SvdqLinear) -> float:
    """Relative output error on the choosing tokens; without tokens the relative error of the weight."""
    if tokens is None:
        return ((layer.dense() - weight).norm() / weight.norm().clamp(min=1e-30)).item()
    chosen = _for_choosing(tokens)
    return _relative(layer.output(chosen), chosen @ weight.T)


def errors(
    weight: torch.Tensor,
    tokens: torch.Tensor | None,
    layer: Rounded,
    precision: str,
    rounded: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Errors of rounding to nearest alone and of the result: of the weight, and of the output where there are enough
    tokens to hold some out. ``rounded``: the inputs of rounding to nearest.
    """
    scale = tensor_scale(weight, precision)
    plain = round_to_nearest(weight, group_scales(weight, precision, scale), scale, precision).dequantise()
    norm = weight.norm().clamp(min=1e-30)
    result = {
        "weight_error_rtn": ((plain - weight).norm() / norm).item(),
        "weight_error": ((layer.dense() - weight).norm() / norm).item(),
    }
    if tokens is not None and len(tokens) > 1:
        held = tokens[1::4]
        wanted = held @ weight.T
        result["error_rtn"] = _relative(rounded(held) @ plain.T, wanted)
        result["error"] = _relative(layer.output(held), wanted)
    return result


def _for_choosing(tokens: torch.Tensor) -> torch.Tensor:
    """Three tokens of four; every fourth is held out for the reported errors."""
    keep = torch.arange(tokens.shape[0], device=tokens.device) % 4 != 1
    return tokens[keep]


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
