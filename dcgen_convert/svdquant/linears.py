"""The one table of 4-bit linears: which a folder holds, of which kind each is, and the tensors of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dcgen_convert.svdquant.awq import AwqLinear
from dcgen_convert.svdquant.forms import is_plain, plain_linears
from dcgen_convert.svdquant.layer import SvdqLinear
from dcgen_convert.svdquant.plain import PlainLinear, plain_spec, unpack_plain
from dcgen_convert.svdquant.tensors import Spec, awq_spec, svdq_spec, unpack_awq, unpack_svdq

# a W4A4 layer with a low-rank branch comes with its row scales (N,)
UnpackedLayer = AwqLinear | PlainLinear | tuple[SvdqLinear, torch.Tensor]


@dataclass(frozen=True)
class LinearKind:
    """A kind of 4-bit linear.

    Attributes:
        spec: weight shape (N, K), and whether there is a bias -> name -> (dtype, shape) of every tensor.
        unpack: the tensors by name -> the layer.
    """

    spec: Callable[[tuple[int, int], bool], Spec]
    unpack: Callable[[dict[str, torch.Tensor]], UnpackedLayer]


PLAIN, W4A16 = LinearKind(plain_spec, unpack_plain), LinearKind(awq_spec, unpack_awq)


def w4a4(precision: str, rank: int) -> LinearKind:
    """A W4A4 linear with a low-rank branch."""
    return LinearKind(
        lambda shape, bias: svdq_spec(shape, precision, rank, bias), lambda tensors: unpack_svdq(tensors, precision)
    )


def kinds(config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, LinearKind]:
    """Module path -> kind of every 4-bit linear, from config.json and the names of the tensors."""
    if is_plain(config):
        return dict.fromkeys(plain_linears(tensors), PLAIN)
    quantisation = config.get("quantization_config") or {}
    svdq, awq = (quantisation.get(section) or {} for section in ("svdq_w4a4", "awq_w4a16"))
    four = {path: w4a4(svdq["precision"], svdq["rank"]) for path in svdq.get("targets", ())}
    return four | dict.fromkeys(awq.get("targets", ()), W4A16)
