"""Tensors of safetensors files, read one by one when they are asked for. Nothing stays in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dcgen_convert.checkpoint.headers import Entry, read_weights
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_tensor(entry: Entry) -> torch.Tensor:
    """The tensor that a header entry points to.

    torch allocates its memory, and so aligns it: a sum may round differently over memory of another alignment, and the
    same inputs must give the same bytes.
    """
    buffer = torch.empty(entry.end - entry.start, dtype=torch.uint8)
    with open(entry.file, "rb") as file:
        file.seek(entry.start)
        if file.readinto(buffer.numpy().data) != len(buffer):
            raise InputError(f"{entry.file} ends inside a tensor.", hint="Download or copy the checkpoint again.")
    return buffer.view(DTYPES[entry.dtype]).view(entry.shape)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """(config, tensor name -> entry) of a diffusers model folder, sharded or not.

    Errors: InputError when config.json, the weights, or a shard that the index names is missing.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(
            f"{folder} holds no config.json.", hint="Give the transformer folder of a diffusers checkpoint."
        )
    return read_object(config), read_weights(folder)
