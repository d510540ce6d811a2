"""Small weight files from tensors in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dcgen_convert.checkpoint import stream
from dcgen_convert.svdquant.source import NAMES


@dataclass(frozen=True)
class Given(stream.Item):
    """A tensor that is in memory."""

    tensor: torch.Tensor

    def chunks(self) -> Iterator[memoryview]:
        yield self.tensor.reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file from tensors in memory.

    The same tensors give the same bytes. safetensors' own writer puts several metadata keys in an order that differs
    from run to run.
    """
    items = {
        name: Given(NAMES[tensor.dtype], tuple(tensor.shape), tensor.contiguous()) for name, tensor in tensors.items()
    }
    stream.write(path, items, metadata)
