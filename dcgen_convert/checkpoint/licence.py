"""The licence of a bundle: the fields that its sources state, or "unknown". It is never invented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dcgen_convert.families import catalog

FIELDS = ("license", "license_name", "license_link")
FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def licence_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint folder says of its licence.

    Returns the fields license, license_name and license_link of its README's front matter where present, and "files",
    the names of its licence files. Without any of them: {"license": "unknown", "files": []}.
    """
    stated = {key: value for key, value in front_matter(Path(folder) / "README.md").items() if key in FIELDS and value}
    files = sorted({path.name for pattern in FILES for path in Path(folder).glob(pattern) if path.is_file()})
    return {**(stated or {"license": "unknown"}), "files": files}


def licence_of_source(name: str, folder: Path) -> dict[str, Any]:
    """`licence_of` the base model in ``folder``, which the user called ``name``."""
    stated, entry = licence_of(folder), catalog.find_source(name)
    if stated["license"] == "unknown" and entry and entry.folder:
        stated["license"] = entry.licence  # shipped with this program, which knows its own licence
    return stated


def front_matter(readme: Path) -> dict[str, Any]:
    """The YAML block between the first two `---` lines of a hub README; empty if there is none or it is no mapping."""
    if not readme.is_file():
        return {}
    lines = readme.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return {}
    end = next(i for i, line in enumerate(lines[1:], 1) if line.strip() == "---")
    try:
        block = yaml.safe_load("\n".join(lines[1:end]))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}  # a README that the hub cannot read either states nothing
    return block if isinstance(block, dict) else {}
