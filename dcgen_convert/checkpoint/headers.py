"""Safetensors headers without torch: names, dtypes, shapes and byte ranges, checked against the file's size.

Format: 8 bytes little-endian header length, JSON header, tensor bytes (safetensors format document). The tensors must
cover the bytes after the header exactly: no byte belongs to two tensors, and none to no tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint import variants
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import require_regular
from dcgen_convert.core.journal import cleaned_stage

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
MAX_HEADER = 100_000_000  # bytes, the format's own limit
LFS = b"version https://git-lfs"  # how a pointer begins that stands for a large file


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
    require_regular(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        require_content(path, start + file.read(len(LFS) - 8))
        file.seek(8)
        length = int.from_bytes(start, "little")
        if (size and size < 8) or length > MAX_HEADER:
            raise InputError(f"{path} is no safetensors file", "give a .safetensors or a .gguf, or a folder")
        if size < 8 or length > size - 8:
            raise InputError(
                f"{path} is truncated or no safetensors file: header of {length} bytes in a file of {size}",
                "fetch it again",
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
        if not isinstance(metadata, dict):
            raise ValueError("its __metadata__ is no object")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} has a damaged safetensors header: {error}", "fetch it again") from error
    _require_layout(path, entries, 8 + length, size)
    return entries, metadata


def require_content(path: Path, start: bytes) -> None:
    """InputError when a file is only a pointer of Git LFS; ``start``: its first bytes, at least as many as `LFS`."""
    if start.startswith(LFS):
        raise InputError(
            f"{path} is a pointer of Git LFS, and not the file itself",
            "run `git lfs pull` in its repository, or fetch the checkpoint again",
        )


def _require_layout(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """InputError unless the tensors lie one after the other from ``start`` to the end of the file."""
    before = "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < start:
            raise InputError(f"{path} is damaged: {name} lies on bytes of {before}", "fetch it again")
        if entry.start > start:
            raise InputError(
                f"{path} is damaged: {entry.start - start} bytes between {before} and {name} belong to no tensor",
                "fetch it again",
            )
        start, before = entry.end, name
    if start > size:
        raise InputError(f"{path} is truncated: {size} bytes, its header asks for {start}", "fetch it again")
    if start < size:
        raise InputError(
            f"{path} is damaged: {size - start} bytes after {before} belong to no tensor", "fetch it again"
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)} twice")
    return found


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
        InputError: no weights, weights that `clean` has removed, only pickles, a shard missing, or an index that
            disagrees with its shards.
    """
    folder = Path(folder)
    if stage := cleaned_stage(folder):
        again = f"dcgen-convert resume {stage.parent} --from {stage.name} makes them again"
        raise InputError(f"{folder}: clean has removed its weights", again)
    names = [path.name for path in folder.glob("*")] if folder.is_dir() else []
    chosen = variants.chosen(names, folder)
    index = next((name for name in chosen if name.endswith(".json")), None)
    if index is not None:
        return _read_shards(folder, folder / index)
    files = [name for name in chosen if name.endswith(".safetensors")]
    if len(files) == 1:
        return read_header(folder / files[0])[0]
    if files:
        raise InputError(
            f"{folder} holds {len(files)} safetensors files and no index",
            "keep one, or add the .safetensors.index.json",
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise InputError(
            f"{folder} holds only pickle weights ({pickles[0]}), which are refused", "save them as .safetensors first"
        )
    raise InputError(f"{folder} holds no safetensors weights", "give a diffusers folder, a hub id or a recipe name")


def _read_shards(folder: Path, index: Path) -> dict[str, Entry]:
    weight_map = variants.weight_map(index)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise InputError(f"{index} names the shard {shard}, which is missing", "fetch the checkpoint again")
        for name, entry in read_header(folder / shard)[0].items():
            if name in entries:
                raise InputError(
                    f"{folder} holds {name} in {entries[name].file.name} and in {shard}", "fetch the checkpoint again"
                )
            entries[name] = entry
    lost = sorted(set(weight_map) ^ set(entries))
    if lost:
        raise InputError(
            f"{index} and its shards disagree on {len(lost)} tensors, first {lost[0]}", "fetch the checkpoint again"
        )
    return entries
