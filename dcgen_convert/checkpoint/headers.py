"""Safetensors headers without torch: names, dtypes, shapes and byte ranges, checked against the file's size.

Format: 8 bytes little-endian header length, JSON header, tensor bytes (safetensors format document).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json

BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
VARIANT = re.compile(r"\.(?P<variant>[a-z0-9_]+)(?P<shard>-\d{5}-of-\d{5})?\.safetensors$")  # model.fp16.safetensors
INDEX_VARIANT = re.compile(r"\.index\.(?P<variant>[a-z0-9_]+)\.json$")
MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor: where it lies (``start``/``end`` are offsets from the file's first byte), its dtype and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors and metadata of one safetensors file; InputError when it is truncated or malformed."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise InputError(
            f"{path} is a pickle checkpoint, which is refused because loading it runs code",
            "save it as .safetensors first",
        )
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise InputError(
                f"{path} is truncated or no safetensors file: header of {length} bytes in a file of {size}",
                "fetch it again",
            )
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} has a damaged safetensors header: {error}", "fetch it again") from error
    end = max((entry.end for entry in entries.values()), default=8 + length)
    if end != size:
        raise InputError(f"{path} is truncated: {size} bytes, its header asks for {end}", "fetch it again")
    return entries, metadata


def _entry(path: Path, name: str, value: dict, base: int) -> Entry:
    if not name.isprintable():
        raise ValueError(f"a tensor called {name!r}")
    start, end = value["data_offsets"]
    shape, dtype = tuple(value["shape"]), value["dtype"]
    if not all(type(n) is int for n in (start, end, *shape)):
        raise ValueError(f"{name} has offsets {[start, end]} and the shape {list(shape)}")
    if dtype not in BYTES:
        raise ValueError(f"{name} has the unknown dtype {dtype}")
    if not 0 <= start <= end or end - start != math.prod(shape) * BYTES[dtype] or any(n < 0 for n in shape):
        raise ValueError(f"{name} says {dtype} {list(shape)} but spans {end - start} bytes")
    return Entry(path, dtype, shape, base + start, base + end)


def read_weights(folder: Path) -> dict[str, Entry]:
    """Tensors of a diffusers module folder: of its single file, or of the shards that its index names.

    A precision variant (`model.fp16.safetensors`) is read only if there are no plain files.

    Raises:
        InputError: no weights, only pickles, a shard missing, or an index that disagrees with its shards.
    """
    folder = Path(folder)
    indexes = _plain_first(folder.glob("*.safetensors.index*.json"), INDEX_VARIANT)
    if indexes:
        return _read_shards(folder, indexes[0])
    files = _plain_first((path for path in folder.glob("*.safetensors") if not path.name.startswith(".")), VARIANT)
    if len(files) == 1:
        return read_header(files[0])[0]
    if files:
        raise InputError(
            f"{folder} holds {len(files)} safetensors files and no index",
            "keep one, or add the .safetensors.index.json",
        )
    pickles = [path.name for path in folder.glob("*") if path.suffix in PICKLES] if folder.is_dir() else []
    if pickles:
        raise InputError(
            f"{folder} holds only pickle weights ({pickles[0]}), which are refused", "save them as .safetensors first"
        )
    raise InputError(f"{folder} holds no safetensors weights", "give a diffusers folder, a hub id or a recipe name")


def _plain_first(paths: Iterable[Path], variant: re.Pattern) -> list[Path]:
    """The files without a variant in their name; all files if each has one."""
    found = sorted(paths)
    return [path for path in found if not variant.search(path.name)] or found


def _read_shards(folder: Path, index: Path) -> dict[str, Entry]:
    try:
        weight_map: dict[str, str] = dict(read_json(index)["weight_map"])
        shards = sorted(set(weight_map.values()))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{index} is no index of shards: {type(error).__name__}: {error}", "fetch the checkpoint again"
        ) from error
    entries: dict[str, Entry] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
            raise InputError(f"{index} names the shard {shard}, which is missing", "fetch the checkpoint again")
        entries.update(read_header(folder / shard)[0])
    lost = sorted(set(weight_map) ^ set(entries))
    if lost:
        raise InputError(
            f"{index} and its shards disagree on {len(lost)} tensors, first {lost[0]}", "fetch the checkpoint again"
        )
    return entries
