"""What tests of quantisation have in common: statistics in one call, one layer alone, and GPTQ's objective."""

import torch

from dcgen_convert.svdquant.layer import SvdqLinear, quantize_linears
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.stats import Gatherer, Stats


def stats_of(*calls: torch.Tensor, seed: int = 0) -> Stats:
    """Statistics of a layer whose input in call i is ``calls[i]``, (tokens, K)."""
    gatherer = Gatherer("layer", calls[0].shape[-1], len(calls), seed)
    for number, x in enumerate(calls):
        gatherer.add(x, number)
    return gatherer.stats()


def quantize_linear(
    name: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stats: Stats | None,
    settings: QuantSettings,
    generator: torch.Generator,
) -> SvdqLinear:
    """One layer alone."""
    return quantize_linears([name], [weight], [bias], stats, settings, generator)[0]


def objective(weight: torch.Tensor, quantised: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)^T): what GPTQ minimises."""
    difference = weight - quantised
    return ((difference @ hessian) * difference).sum().item()
