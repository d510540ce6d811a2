"""Block outputs on disk, one file per call: what the next block starts from, in this run or in a resumed one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dcgen_convert.svdquant import trees


class Spool:
    """Outputs of the blocks last run, `folder/<block path>/<call>.safetensors`, as `trees` keeps them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, block: str, call: int, output: Any) -> None:
        """Keep a block's output for one call."""
        path = self._path(block, call)
        path.parent.mkdir(parents=True, exist_ok=True)
        trees.save(output, path)

    def get(self, block: str, call: int, device: str) -> Any:
        """The output that `put` kept, on `device`."""
        return trees.load(self._path(block, call), device)

    def drop(self, block: str) -> None:
        """Forget a block's outputs."""
        shutil.rmtree(self.folder / block, ignore_errors=True)

    def _path(self, block: str, call: int) -> Path:
        return self.folder / block / f"{call:05d}.safetensors"
