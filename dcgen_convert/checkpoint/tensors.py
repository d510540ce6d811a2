"""Single tensors of weight files: read one by one when they are asked for, and their hashes.

A hash is of a tensor's bytes alone, whatever file and shard they lie in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dcgen_convert.checkpoint.headers import Entry, read_weights
from dcgen_convert.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 22  # bytes
TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""dtype of a safetensors file -> its name in torch."""


def tensor_sha256(entry: Entry) -> str:
    """Hex SHA-256 of the bytes that a header entry points to."""
    digest, left = hashlib.sha256(), entry.end - entry.start
    with open(entry.file, "rb") as reader:
        reader.seek(entry.start)
        while left and (chunk := reader.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two folders of weights hold the same tensors: names, shapes, dtypes and bytes."""
    return same_entries(read_weights(one), read_weights(other))


def same_entries(first: Mapping[str, Entry], second: Mapping[str, Entry]) -> bool:
    """Whether two headers point to the same tensors: names, shapes, dtypes and bytes."""
    kinds = [{name: (entry.dtype, entry.shape) for name, entry in found.items()} for found in (first, second)]
    return kinds[0] == kinds[1] and all(tensor_sha256(first[name]) == tensor_sha256(second[name]) for name in first)


def read_tensor(entry: Entry, first: int = 0, last: int | None = None) -> Tensor:
    """The tensor that a header entry points to, or its rows [first, last).

    torch allocates its memory, and so aligns it: a sum may round differently over memory of another alignment, and the
    same inputs must give the same bytes. Nothing of the file stays mapped.
    """
    import torch

    rows = entry.shape[0] if entry.shape else 1
    shape, size = entry.shape, entry.end - entry.start
    if (first, last) != (0, None):
        shape, size = ((last or rows) - first, *entry.shape[1:]), size // rows * ((last or rows) - first)
    buffer = torch.empty(size, dtype=torch.uint8)
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.start + first * ((entry.end - entry.start) // max(rows, 1)))
        data, done = buffer.numpy().data, 0
        while done < size:  # one read gives at most 2 GiB
            count = file.readinto(data[done:])
            if not count:
                raise InputError(f"{entry.file} ends inside a tensor.", hint="Download or copy the checkpoint again.")
            done += count
    return buffer.view(getattr(torch, TORCH[entry.dtype])).view(shape)


def as_bytes(tensor: Tensor, dtype: str) -> memoryview:
    """The bytes of a tensor that is rounded to ``dtype``, a name of a safetensors file."""
    import torch

    rounded = tensor.to(getattr(torch, TORCH[dtype])).contiguous()
    return rounded.view(-1).view(torch.uint8).numpy().data
