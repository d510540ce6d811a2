"""Copies a component folder of a diffusers checkpoint: real copies instead of links, hashed while they are copied.

Hub folders hold files that a bundle must not take over: pickles beside safetensors, and precision variants
(`model.fp16.safetensors`) beside the plain files. If a folder holds one variant only, its files get the plain names:
then the bundle loads without a `variant=` argument. Code files are not copied, except this program's own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.headers import INDEX_VARIANT, VARIANT
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import copy_file, read_object

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
    variants = {n: match["variant"] for n in weights if (match := VARIANT.search(n))}
    variants |= {n: match["variant"] for n in names if (match := INDEX_VARIANT.search(n))}
    keep = [n for n in names if n not in pickles and not n.endswith(tuple(f"{p}.index.json" for p in PICKLES))]
    if any(n not in variants for n in weights):
        return {n: n for n in keep if n not in variants}
    if len(set(variants.values())) > 1:
        raise InputError(
            f"{source} holds the variants {', '.join(sorted(set(variants.values())))} and no plain weights",
            "keep one of them",
        )
    return {n: _plain(n) if n in variants else n for n in keep}


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
            else:
                hashes[new_name] = copy_file(source / name, destination, bar.advance)
    return hashes


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _plain(name: str) -> str:
    name = INDEX_VARIANT.sub(".index.json", name)
    return VARIANT.sub(lambda m: f"{m['shard'] or ''}.safetensors", name)


def write_index(source: Path, target: Path) -> str:
    index = read_object(source)
    if not isinstance(index.get("weight_map"), dict) or not all(
        isinstance(name, str) for name in index["weight_map"].values()
    ):
        raise InputError(f"{source} is no index of shards", "fetch the checkpoint again")
    index["weight_map"] = {key: _plain(name) for key, name in index["weight_map"].items()}
    data = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
    target.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
