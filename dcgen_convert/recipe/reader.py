"""Reads the small files that say what a model is: JSON configs in folders and on the hub, and headers of weight files.

No weights are read, and torch is not needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcgen_convert import families
from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.core.files import read_object

if TYPE_CHECKING:
    from dcgen_convert.checkpoint.single import Single


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class Reader:
    """Reads each file once and keeps what it read. The documents are shared: copy one before you change it."""

    def __init__(self) -> None:
        self._documents: dict[Path, dict[str, Any]] = {}
        self._singles: dict[Path, Single] = {}

    def document(self, path: Path) -> dict[str, Any]:
        """The object in a JSON file; InputError when the file holds something else."""
        if path not in self._documents:
            self._documents[path] = read_object(path)
        return self._documents[path]

    def optional(self, path: Path) -> dict[str, Any] | None:
        """`document`, or None where there is no such file."""
        return self.document(path) if path.is_file() else None

    def first(self, *candidates: Path) -> dict[str, Any]:
        """The first file of ``candidates`` that exists; InputError when none does."""
        for path in candidates:
            if path.is_file():
                return self.document(path)
        raise InputError(
            f"no config found: {candidates[0]} does not exist",
            "give a diffusers folder (the one with model_index.json)",
        )

    def single(self, path: Path) -> Single:
        """The transformer in a .safetensors or .gguf file, from its header."""
        from dcgen_convert.checkpoint.single import read_single

        if path not in self._singles:
            self._singles[path] = read_single(path)
        return self._singles[path]

    def hub(self, repo: str, name: str, offline: bool) -> dict[str, Any]:
        """A JSON file of a hub repository, from the hub's cache first.

        Raises:
            AccessError: it is not in the cache, and the network is off.
        """
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(repo, name)
        if isinstance(cached, str):
            return self.document(Path(cached))
        if offline or constants.HF_HUB_OFFLINE:
            raise AccessError(
                f"{name} of {repo} is not in the cache and the network is off",
                "drop --offline, or give a local folder, or name a --recipe",
            )
        return self.document(Path(hf_hub_download(repo, name)))

    def hub_network(self, repo: str, offline: bool) -> dict[str, Any]:
        """The config of the network of a hub repository, whatever its folder is called; errors as `hub`."""
        from huggingface_hub.errors import EntryNotFoundError

        first, *others = families.COMPONENTS
        try:
            return self.hub(repo, f"{first}/config.json", offline)
        except (AccessError, EntryNotFoundError):
            for name in others:
                try:
                    return self.hub(repo, f"{name}/config.json", offline)
                except (AccessError, EntryNotFoundError):
                    continue
            raise
