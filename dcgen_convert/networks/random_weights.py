"""Random weights for a network of any class, as tensors that are made while they are written.

Drawing billions of normal numbers takes minutes, so one pool of them is drawn and used again and again: a tensor takes
the pool's numbers from a place of its own, times its own scale. The length of the pool is prime, so no two rows of a
matrix are alike. The numbers are no model, but they keep all sizes in bounds:

    matrices, convolutions, embeddings, tables    normal, standard deviation 1 / sqrt(numbers per output)
    norms                                         the factor 1
    biases                                        0
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcgen_convert.checkpoint.stream import CHUNK, Item, Zeros
from dcgen_convert.checkpoint.tensors import TORCH

POOL = 4_194_301  # numbers; a prime
FROM_ZERO = ("Gemma2RMSNorm",)  # norms that add 1 to their weight


def pool(seed: int) -> Tensor:
    """Normal numbers, (POOL,) float32."""
    return torch.randn(POOL, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Drawn(Item):
    """A tensor of the pool's numbers, times ``scale``, from the place ``start`` on and around its end."""

    numbers: Tensor = field(repr=False)
    start: int
    scale: float

    def chunks(self) -> Iterator[memoryview]:
        """The bytes; one copy of the pool in the tensor's dtype is held."""
        left, start = math.prod(self.shape), self.start
        scaled = (self.numbers * self.scale).to(getattr(torch, TORCH[self.dtype]))
        while left:
            piece = scaled[start : start + left]
            yield piece.view(torch.uint8).numpy().data
            left, start = left - len(piece), 0


@dataclass(frozen=True)
class Ones(Item):
    """A tensor of ones."""

    def chunks(self) -> Iterator[memoryview]:
        left = math.prod(self.shape)
        ones = torch.ones(min(left, CHUNK // 8), dtype=getattr(torch, TORCH[self.dtype]))
        while left:
            piece = ones[:left]
            yield piece.view(torch.uint8).numpy().data
            left -= len(piece)


def items(model: nn.Module, dtype: str, name: str, numbers: Tensor) -> dict[str, Item]:
    """The tensors of ``model``, which may be on the meta device: every parameter once, and the buffers that are saved.

    Args:
        dtype: of the floating-point tensors, as safetensors names it.
        name: of the model; two models with different names get different numbers.
        numbers: see `pool`.
    """
    found: dict[str, Item] = {}
    for key, parameter in model.named_parameters():  # a tied one comes once
        found[key] = _parameter(model, key, parameter, dtype, f"{name}/{key}", numbers)
    saved = model.state_dict()
    for key, buffer in model.named_buffers():
        if key in saved:
            found[key] = _buffer(key, buffer, dtype)
    return found


def _parameter(model: nn.Module, key: str, value: Tensor, dtype: str, label: str, numbers: Tensor) -> Item:
    shape = tuple(value.shape)
    if key.endswith("bias") and value.ndim == 1:
        return Zeros(dtype, shape)
    if value.ndim == 1:
        owner = type(model.get_submodule(key.rpartition(".")[0])).__name__
        return (Zeros if owner in FROM_ZERO else Ones)(dtype, shape)
    start = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little") % POOL
    return Drawn(dtype, shape, numbers, start, 1 / math.sqrt(max(1, value[0].numel())))


def _buffer(key: str, value: Tensor, dtype: str) -> Item:
    """Batch norm's statistics: mean 0, variance 1, no batches seen."""
    kind: Any = Ones if key.endswith("running_var") else Zeros
    item: Item = kind(dtype if value.is_floating_point() else "I64", tuple(value.shape))
    return item
