"""Weight files of a model folder: shards with their index, streamed; and small files from tensors in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dcgen_convert.checkpoint import stream
from dcgen_convert.core.files import write_json
from dcgen_convert.svdquant.source import NAMES

SHARD_BYTES = 5 * 1000**3  # a file is closed before it would pass this size: the usual size of shards on the hub
STEM = "diffusion_pytorch_model"
METADATA = {"format": "pt"}


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


def write_folder(folder: Path, items: Mapping[str, stream.Item]) -> None:
    """The weight files of a diffusers model folder: one file, or shards of at most `SHARD_BYTES` with their index.

    The tensors are dealt to the shards in the order of ``items``.
    """
    shards: list[dict[str, stream.Item]] = [{}]
    filled = 0
    for name, item in items.items():
        if shards[-1] and filled + item.size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = item
        filled += item.size
    if len(shards) == 1:
        stream.write(folder / f"{STEM}.safetensors", items, METADATA)
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        stream.write(folder / file, shard, METADATA)
        where |= dict.fromkeys(shard, file)
    total = {"total_size": sum(item.size for item in items.values())}
    write_json(folder / f"{STEM}.safetensors.index.json", {"metadata": total, "weight_map": where})
