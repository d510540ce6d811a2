"""GGUF files. This module reads the header, never past the file's end; the `gguf` package turns blocks into numbers.

Format: "GGUF", version, counts, key-value pairs, tensor infos (dimensions innermost first), then aligned data
(ggml's gguf.md, versions 2 and 3).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dcgen_convert.checkpoint.headers import MAX_HEADER, Entry
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import require_regular

if TYPE_CHECKING:
    from torch import Tensor

SHAPE_KEY = "comfy.gguf.orig_shape."  # shape of a tensor that was reshaped for its block format
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
NESTED = 4  # arrays within arrays
MAX_DIMS = 8


class _Cursor:
    """A position in the header; ValueError past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if 0 <= count <= min(MAX_HEADER, self.size) else b""
        if len(data) != count:
            raise ValueError("it ends early")
        return data

    def number(self, code: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> object:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth == NESTED:
            raise ValueError(f"unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if count > self.size:
            raise ValueError(f"an array of {count} values")
        if inner in SCALARS:
            return [
                item[0]
                for item in struct.iter_unpack(SCALARS[inner], self.take(count * struct.calcsize(SCALARS[inner])))
            ]
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_gguf(path: Path) -> dict[str, tuple[Entry, str]]:
    """Every tensor, from the header: name -> (where its bytes lie and its shape, its block format).

    Raises:
        InputError: the gguf package is missing, or the file is damaged or truncated.
    """
    sizes = _package().GGML_QUANT_SIZES
    size = path.stat().st_size
    require_regular(path)
    with open(path, "rb") as file:
        try:
            return _read(path, _Cursor(file, size), size, sizes)
        except (ValueError, OverflowError, TypeError) as error:
            raise InputError(f"{path} has a damaged GGUF header: {error}", "fetch it again") from error


def _read(path: Path, cursor: _Cursor, size: int, sizes: dict[Any, tuple[int, int]]) -> dict[str, tuple[Entry, str]]:
    kinds = {int(kind): kind.name for kind in sizes}
    blocks = {kind.name: pair for kind, pair in sizes.items()}
    magic, version = cursor.take(4), cursor.number("<I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    tensors, pairs = cursor.number("<Q"), cursor.number("<Q")
    facts: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        facts[key] = cursor.value(cursor.number("<I"))
    infos = [_info(cursor) for _ in range(tensors)]
    alignment = facts.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"its alignment is {alignment}")
    base = -(-cursor.file.tell() // alignment) * alignment
    found: dict[str, tuple[Entry, str]] = {}
    for name, stored, kind, offset in infos:
        if kind not in kinds or name in found:
            raise ValueError(f"{name} has the unknown format {kind}" if kind not in kinds else f"{name} stands twice")
        block, width = blocks[kinds[kind]]
        count, start = math.prod(stored), base + offset
        end = start + count // block * width
        shape = tuple(facts.get(SHAPE_KEY + name, stored))
        if count % block or math.prod(shape) != count or any(not isinstance(n, int) or n < 0 for n in shape):
            raise ValueError(f"{name} says {kinds[kind]} {list(shape)}")
        if end > size:
            raise ValueError(f"{name} ends at byte {end} of {size}")
        found[name] = (Entry(path, "U8", shape, start, end), kinds[kind])
    if not found:
        raise ValueError("it holds no tensors")
    return found


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, format, offset) of one tensor."""
    name, dims = cursor.text(), cursor.number("<I")
    if not name.isprintable():
        raise ValueError(f"a tensor called {name!r}")
    if dims > MAX_DIMS:
        raise ValueError(f"{name} has {dims} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dims))
    return name, shape[::-1], cursor.number("<I"), cursor.number("<Q")


def whole_blocks(kind: str, count: int) -> bool:
    """Whether ``count`` numbers are whole blocks of the format."""
    gguf = _package()
    return count % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0


def dequantise(data: bytearray, kind: str, rows: int) -> Tensor:
    """The numbers in whole blocks, (rows, ...) float32; InputError for a format that the package cannot dequantise."""
    import numpy as np
    import torch

    gguf = _package()
    try:
        numbers = gguf.dequantize(np.frombuffer(data, np.uint8).reshape(rows, -1), gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise InputError(
            f"the gguf package cannot dequantise {kind}", "give a Q4, Q5, Q6 or Q8 file, or the dense model"
        ) from error
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float32))


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF files need the gguf package", "pip install 'dcgen-convert[gguf]'") from error
    return gguf
