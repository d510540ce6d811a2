"""Block outputs on disk, one file and its JSON neighbour per call: what the next block starts from, in this run or in
a resumed one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dcgen_convert.svdquant.source import read_header


class Spool:
    """Outputs of the blocks last run, `folder/<block path>/<call>.safetensors`; a tree of tuples, lists, dicts,
    tensors, plain values.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def put(self, block: str, call: int, output: Any) -> None:
        """Keep a block's output for one call."""
        tensors: dict[str, torch.Tensor] = {}
        tree = _flatten(output, tensors)
        path = self._path(block, call)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(tree))
        save_file(tensors, path)

    def get(self, block: str, call: int, device: str) -> Any:
        """The output that `put` kept, on `device`."""
        path = self._path(block, call)
        tree = json.loads(path.with_suffix(".json").read_text())
        return _unflatten(tree, {name: entry.read().to(device) for name, entry in read_header(path).items()})

    def drop(self, block: str) -> None:
        """Forget a block's outputs."""
        shutil.rmtree(self.folder / block, ignore_errors=True)

    def _path(self, block: str, call: int) -> Path:
        return self.folder / block / f"{call:05d}.safetensors"


def _flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON tree of `value`; its tensors go to `tensors`."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_flatten(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: _flatten(item, tensors) for key, item in value.items()}}
    return {"value": value}


def _unflatten(tree: dict, tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("tuple", "list"):
        items = [_unflatten(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content.items()}
    return content
