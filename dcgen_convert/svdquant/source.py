"""A diffusers transformer folder, read tensor by tensor: headers first, bytes only when asked for. Nothing stays in
memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dcgen_convert.checkpoint import headers
from dcgen_convert.core.errors import InputError

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
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
    """Tensor name -> entry of one safetensors file; InputError when it is cut short or malformed."""
    return _entries(headers.read_header(path)[0])


def read_folder(folder: Path) -> tuple[dict, dict[str, Entry]]:
    """(config, tensor name -> entry) of a diffusers model folder, sharded or not.

    Errors: InputError when config.json, the weights, or a shard that the index names is missing.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(
            f"{folder} holds no config.json.", hint="Give the transformer folder of a diffusers checkpoint."
        )
    return json.loads(config.read_text()), _entries(headers.read_weights(folder))


def _entries(found: dict[str, headers.Entry]) -> dict[str, Entry]:
    return {
        name: Entry(name, DTYPES[entry.dtype], entry.shape, entry.file, entry.start, entry.end - entry.start)
        for name, entry in found.items()
    }
