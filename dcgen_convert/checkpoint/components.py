"""Copies a component folder of a diffusers checkpoint: real copies instead of links, hashed while they are copied.

Hub folders hold files that a bundle must not take over: pickles beside safetensors, and precision variants
(`model.fp16.safetensors`) beside the plain files. If a folder holds one variant only, its files get the plain names:
then the bundle loads without a `variant=` argument. Code files are not copied, except this program's own.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint import trust, variants
from dcgen_convert.checkpoint.headers import LFS, read_weights, require_content
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import copy_file, read_object, sha256, write_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".onnx_data")


def plan_copy(source: Path) -> dict[str, str]:
    """Files of ``source`` that a bundle takes: relative source name -> name in the bundle.

    Raises InputError when the folder does not exist, or holds weights as pickles only.
    """
    if not source.is_dir():
        raise InputError(f"the component folder {source} does not exist", "fetch the whole checkpoint again")
    code = trust.foreign_files(source)
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and path not in code]
    names = sorted(path.as_posix() for path in files if not _hidden(path))
    pickles = [n for n in names if n.endswith(PICKLES)]
    weights = [n for n in names if n.endswith(".safetensors")]
    if pickles and not weights:
        raise InputError(
            f"{source / pickles[0]} is a pickle and there is no safetensors file beside it",
            "convert it to safetensors first",
        )
    taken: set[str] = set()
    for place in {Path(n).parent for n in weights}:
        inside = [Path(n).name for n in names if Path(n).parent == place]
        taken |= {(place / n).as_posix() for n in variants.chosen(inside, source / place)}
    keep = [n for n in names if n not in pickles and not n.endswith(tuple(f"{p}.index.json" for p in PICKLES))]
    other = [n for n in keep if not n.endswith(variants.SUFFIX) and not variants.is_index(n)]
    for n in other:
        with open(source / n, "rb") as file:
            start = file.read(len(LFS))
        require_content(source / n, start)
        if n.endswith(".json") and start.startswith(codecs.BOM_UTF8):
            raise InputError(
                f"{source / n} begins with a byte order mark, which diffusers and transformers do not read",
                "save it as UTF-8 without BOM",
            )
    return {n: variants.plain(n) if n in taken else n for n in sorted({*other, *taken})}


def check_component(folder: Path) -> None:
    """InputError when a component cannot be read as its files say: a pointer of Git LFS, a damaged header or index."""
    for place in sorted({(folder / name).parent for name in plan_copy(folder) if name.endswith(variants.SUFFIX)}):
        read_weights(place)


def copy_component(source: Path, target: Path, console: Console, *, label: str) -> dict[str, str]:
    """Copy the planned files of ``source`` into the new folder ``target``.

    Returns:
        Name in the bundle -> SHA-256 of the bytes that were read.
    """
    plan = plan_copy(source)
    if code := trust.foreign_files(source):
        names = ", ".join(path.relative_to(source).as_posix() for path in code)
        console.warn(f"{label}: the bundle does not take the code {names}")
    total = sum((source / name).stat().st_size for name in plan)
    hashes = {}
    with console.progress(f"copy {label}", total, "B") as bar:
        for name, new_name in plan.items():
            destination = target / new_name
            destination.parent.mkdir(parents=True, exist_ok=True)
            if name != new_name and name.endswith(".json"):
                hashes[new_name] = write_index(source / name, destination)
            elif name.endswith("config.json") and (public := _public(config := read_object(source / name))) != config:
                write_json(destination, public)
                hashes[new_name] = sha256(destination)
            else:
                hashes[new_name] = copy_file(source / name, destination, bar.advance)
    return hashes


def _public(config: Any) -> Any:
    """``config`` without the names of folders on the machine where it was saved, in its inner configs too."""
    if not isinstance(config, dict):
        return config
    return {key: _public(value) for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def write_index(source: Path, target: Path) -> str:
    """Write an index with the plain names of its shards; returns its SHA-256."""
    named = {key: variants.plain(name) for key, name in variants.weight_map(source).items()}
    index = {**read_object(source), "weight_map": named}
    data = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
    target.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
