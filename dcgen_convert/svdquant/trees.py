"""Trees of tuples, lists, dicts, tensors and plain values as one safetensors file: what a forward is given or
returns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.checkpoint.headers import read_header
from dcgen_convert.checkpoint.tensors import read_tensor
from dcgen_convert.core.errors import CheckFailed
from dcgen_convert.core.files import save_tensors, understood

KEY = "tree"  # of the file's metadata


def save(tree: Any, path: Path) -> None:
    """Keep ``tree`` in a safetensors file."""
    structure, tensors = flatten(tree)
    save_tensors(tensors, path, {KEY: structure})


def load(path: Path, device: str = "cpu") -> Any:
    """The tree that `save` kept, its tensors on ``device``; a file without a tree is a dict of its tensors.

    Raises:
        InputError: a damaged file.
    """
    entries, metadata = read_header(path)
    with understood(path, "delete its folder: it is made again"):
        structure = metadata.get(KEY)
        tensors = {name: read_tensor(entry).to(device) for name, entry in entries.items()}
        return tensors if structure is None else _unflatten(json.loads(structure), tensors)


def flatten(tree: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """(structure as JSON, its tensors by number, on the CPU). CheckFailed for a value that JSON cannot hold."""
    tensors: dict[str, torch.Tensor] = {}
    return json.dumps(_flatten(tree, tensors)), tensors


def map_tensors(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``tree`` with ``function`` applied to every tensor."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, tuple | list):
        items = [map_tensors(item, function) for item in tree]
        return tuple(items) if isinstance(tree, tuple) else items
    if isinstance(tree, Mapping):
        return {key: map_tensors(item, function) for key, item in tree.items()}
    return tree


def _flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # two places of a tree may share memory
        return {"tensor": name}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_flatten(item, tensors) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": {key: _flatten(item, tensors) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise CheckFailed(
        f"a value of type {type(value).__name__} among a model's inputs or outputs cannot be kept in a file"
    )


def _unflatten(tree: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("tuple", "list"):
        items = [_unflatten(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content.items()}
    if kind != "value":
        raise ValueError(f"a tree has no {kind!r}")
    return content
