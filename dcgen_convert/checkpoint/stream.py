"""Writing a safetensors file tensor by tensor, without ever holding more than one chunk of it.

The bytes are those that `safetensors.torch.save_file` writes for the same tensors and metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from dcgen_convert.checkpoint.headers import BYTES, Entry
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import replacing

CHUNK = 16 << 20  # bytes read at once
CACHED = 1 << 16  # numbers looked at together: they and their masked copy stay in the processor's cache
# The library's order of dtypes, widest first; names are sorted within one.
ORDER = [
    "U64",
    "I64",
    "F64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
]
# dtype -> (the integer of its width, the exponent bits: all ones mean NaN or infinity)
EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}


@dataclass(frozen=True)
class Item:
    """A tensor to be written: its dtype, its shape, and its bytes in order when they are asked for."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]

    def chunks(self) -> Iterator[memoryview | bytes]:
        raise NotImplementedError


@dataclass(frozen=True)
class Zeros(Item):
    """A tensor of zeros."""

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, self.size, CHUNK):
            yield bytes(min(CHUNK, self.size - start))


@dataclass(frozen=True)
class Copied(Item):
    """Byte ranges of a file, one after the other; InputError for NaN and infinity."""

    name: str
    entry: Entry
    ranges: tuple[tuple[int, int], ...]  # offsets in the file

    def chunks(self) -> Iterator[memoryview]:
        with open(self.entry.file, "rb", buffering=0) as file:
            for start, stop in self.ranges:
                yield from read_range(file, self.entry, start, stop, self.name)


def read_range(file: FileIO, entry: Entry, start: int, stop: int, name: str) -> Iterator[memoryview]:
    """Bytes [start, stop) of an open file in chunks, each valid until the next is asked for."""
    buffer = memoryview(bytearray(min(CHUNK, stop - start)))
    file.seek(start)
    while start < stop:
        count = file.readinto(buffer[: min(CHUNK, stop - start)]) or 0
        if not count:
            raise InputError(f"{entry.file} ends within {name}", "fetch it again")
        while count % BYTES[entry.dtype]:  # a read may end inside a number
            more = file.readinto(buffer[count : count + 1])
            if not more:
                raise InputError(f"{entry.file} ends within {name}", "fetch it again")
            count += more
        require_finite(buffer[:count], entry.dtype, name, entry.file)
        yield buffer[:count]
        start += count


def require_finite(data: memoryview, dtype: str, name: str, file: Path) -> None:
    """InputError when numbers of ``dtype`` hold a NaN or an infinity."""
    if dtype not in EXPONENTS:
        return
    integer, exponent = EXPONENTS[dtype]
    numbers = np.frombuffer(data, integer)
    masked = np.empty(min(CACHED, len(numbers)), integer)
    for start in range(0, len(numbers), CACHED):
        part = numbers[start : start + CACHED]
        if np.bitwise_and(part, integer(exponent), out=masked[: len(part)]).max(initial=0) == exponent:
            raise InputError(f"{file} holds NaN or infinite values in {name}", "fetch the checkpoint again")


def whole(name: str, entry: Entry) -> Copied:
    """The tensor ``name`` as it is."""
    return Copied(entry.dtype, entry.shape, name, entry, ((entry.start, entry.end),))


def write(
    path: Path,
    items: Mapping[str, Item],
    metadata: dict[str, str] | None = None,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Write the file, whole or not at all; ``advance`` is told the bytes."""
    order = sorted(items, key=lambda name: (ORDER.index(items[name].dtype), name))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in order:
        item = items[name]
        header[name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [offset, offset + item.size]}
        offset += item.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb", buffering=0) as file:
        _write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            written = 0
            for chunk in items[name].chunks():
                _write_all(file, memoryview(chunk).cast("B"))
                written += len(chunk)
                if advance:
                    advance(len(chunk))
            if written != items[name].size:
                raise ValueError(f"{name}: {written} bytes written, {items[name].size} announced")


def _write_all(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) or 0 :]
