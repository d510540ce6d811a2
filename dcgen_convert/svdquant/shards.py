"""Writing safetensors files without holding their tensors: a header from what is known, then bytes copied through."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dcgen_convert.checkpoint import stream
from dcgen_convert.core.files import write_json
from dcgen_convert.svdquant.source import INDEX, NAMES, SINGLE, Entry


@dataclass(frozen=True)
class Item:
    """One tensor to write: `entry` says where its bytes are now; `cast` is the dtype to write, when it is not the
    entry's.
    """

    name: str
    entry: Entry
    cast: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.cast or self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes // self.entry.dtype.itemsize * self.dtype.itemsize

    def chunks(self) -> Iterator[bytes]:
        if self.dtype == self.entry.dtype:
            yield from self.entry.chunks()
        else:
            yield self.entry.read().to(self.dtype).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class _Held:
    """An `Item` whose tensor is in memory."""

    name: str
    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def chunks(self) -> Iterator[memoryview]:
        yield memoryview(self.tensor.reshape(-1).view(torch.uint8).numpy())


@dataclass(frozen=True)
class _Streamed(stream.Item):
    """An item as `stream.write` takes it."""

    item: Item | _Held

    def chunks(self) -> Iterator[bytes]:
        return self.item.chunks()


def write_file(path: Path, items: Iterable[Item | _Held], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, atomically: the same items give the same bytes. Metadata is by default {"format": "pt"}."""
    streamed = {item.name: _Streamed(NAMES[item.dtype], tuple(item.shape), item) for item in items}
    stream.write(path, streamed, metadata or {"format": "pt"})


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file from tensors in memory; deterministic, also with several metadata keys."""
    write_file(path, [_Held(name, tensor.contiguous()) for name, tensor in tensors.items()], metadata)


def write_folder(folder: Path, items: list[Item], most: int) -> None:
    """The weight files of a diffusers model folder: one file, or shards of at most `most` bytes with their index.
    Order as given.
    """
    shards: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        if shards[-1] and filled + item.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.nbytes
    if len(shards) == 1:
        write_file(folder / SINGLE, items)
        return
    where = {}
    for number, shard in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        where |= {item.name: name for item in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": sum(item.nbytes for item in items)}, "weight_map": where})
