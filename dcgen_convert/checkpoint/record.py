"""What a manifest says of a source: its name, its revision, and the SHA-256 of its files."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from dcgen_convert.core.files import sha256

HUB_FILES = (".git", ".cache", ".gitattributes", ".huggingface")  # what the hub adds to a downloaded folder


def source_record(name: str, root: Path, revision: str | None = None) -> dict[str, Any]:
    """Name as the user or catalogue gave it, revision (None for local folders), and the sha256 of every file under
    ``root``.
    """
    return {"name": name, "revision": revision, "files": hash_files(Path(root))}


def hash_files(root: Path, skip: Container[str] = ()) -> dict[str, str]:
    """Relative posix path -> sha256 of every file under ``root`` that is not in ``skip`` and not the hub client's
    own.
    """
    paths = sorted(path for path in Path(root).rglob("*") if path.is_file())
    names = {path.relative_to(root).as_posix(): path for path in paths}
    return {name: sha256(path) for name, path in names.items() if name not in skip and not is_hub_file(name)}


def is_hub_file(name: str) -> bool:
    """Whether a relative path belongs to the hub client or git and not to the checkpoint."""
    return name.split("/")[0] in HUB_FILES
