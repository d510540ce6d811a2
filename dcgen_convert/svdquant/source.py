"""A diffusers transformer folder, read tensor by tensor: headers first, bytes only when asked for. Nothing stays in
memory.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dcgen_convert.errors import InputError

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 16 << 20


@dataclass(frozen=True)
class Entry:
    """Where one tensor's bytes lie."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int  # bytes from the beginning of the file
    nbytes: int

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own: aligned by torch, because sums may round differently where memory is
        aligned differently.
        """
        buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        with open(self.file, "rb") as file:
            file.seek(self.start)
            if file.readinto(memoryview(buffer.numpy())) != self.nbytes:
                raise InputError(f"{self.file} ends inside {self.name}.", hint="Download or copy the checkpoint again.")
        return buffer.view(self.dtype).view(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes, in pieces."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                piece = file.read(min(left, CHUNK))
                if not piece:
                    raise InputError(
                        f"{self.file} ends inside {self.name}.", hint="Download or copy the checkpoint again."
                    )
                left -= len(piece)
                yield piece


def read_header(path: Path) -> dict[str, Entry]:
    """Tensor name -> entry of one safetensors file. Errors: InputError when the file is cut short or is no safetensors
    file.
    """
    size = path.stat().st_size
    broken = InputError(f"{path} is not a whole safetensors file.", hint="Download or copy the checkpoint again.")
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length + 8 > size:
            raise broken
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise broken from error
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        start, stop = info["data_offsets"]
        if 8 + length + stop > size:
            raise broken
        if info["dtype"] not in DTYPES:
            raise InputError(f"{path}: {name} has dtype {info['dtype']}, which this tool does not know.")
        entries[name] = Entry(name, DTYPES[info["dtype"]], tuple(info["shape"]), path, 8 + length + start, stop - start)
    return entries


def read_folder(folder: Path) -> tuple[dict, dict[str, Entry]]:
    """(config, tensor name -> entry) of a diffusers model folder, sharded or not.

    Errors: InputError when config.json, the weights, or a shard that the index names is missing.
    """
    config_file, index, single = folder / "config.json", folder / INDEX, folder / SINGLE
    if not config_file.is_file():
        raise InputError(
            f"{folder} holds no config.json.", hint="Give the transformer folder of a diffusers checkpoint."
        )
    config = json.loads(config_file.read_text())
    if index.is_file():
        wanted = json.loads(index.read_text())["weight_map"]
        files = [folder / name for name in sorted(set(wanted.values()))]
    elif single.is_file():
        wanted, files = None, [single]
    else:
        raise InputError(
            f"{folder} holds no {SINGLE} and no {INDEX}.", hint="Give the transformer folder of a diffusers checkpoint."
        )
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{folder.name}: the index names {file.name}, which is missing.", hint="Download the missing shard."
            )
        entries |= read_header(file)
    missing = sorted(set(wanted or ()) - entries.keys())
    if missing:
        raise InputError(
            f"{folder.name}: the index names {missing[0]}, which no shard holds.", hint="Download the checkpoint again."
        )
    return config, entries
