"""What a bundle says of where it comes from: repositories, and no place on the machine that made it.

A bundle is published with its manifest and its card. A path in them would tell how the machine is laid out, and often
the name of its owner or of a customer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcgen_convert.families import catalog

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
CACHED = re.compile(r"models--(.+?)--(.+?)/snapshots/([0-9a-f]+)")  # a folder of the hub cache
NAME_KEYS = ("_name_or_path", "name_or_path")  # in configs of components: where the part was loaded from


def repository(name: str) -> str | None:
    """The hub repository that ``name`` means: an alias of the catalogue, a hub id, or a folder of the hub cache.

    None for a folder or a file of this machine, and for what the package itself holds.
    """
    for entry in (catalog.SOURCES.get(name), catalog.AUTOENCODERS.get(name)):
        if entry is not None:
            return entry.repo
    if cached := CACHED.search(Path(name).as_posix()):
        return f"{cached[1]}/{cached[2]}"
    return name if REPOSITORY.fullmatch(name) and not is_place(name) else None


def is_place(text: str) -> bool:
    """Whether ``text`` names a file or folder of this machine."""
    if text.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:[\\/]", text):
        return True
    text = re.sub(r"=[\d.]+$", "", text)  # a share
    try:
        return "/" in text and len(text) < 1000 and Path(text.rpartition(":")[0] or text).exists()
    except (OSError, ValueError):
        return False


def without_places(document: Any) -> Any:
    """Plain data in which every path is cut to its last name."""
    if isinstance(document, Mapping):
        return {key: without_places(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [without_places(value) for value in document]
    return last_name(document) if isinstance(document, str) and is_place(document) else document


def last_name(path: str) -> str:
    """``folder/x.safetensors:0.8`` -> ``x.safetensors:0.8``."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path


def published(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a source as a manifest holds it: the name without its place, and the repository ("repo")."""
    name = str(record["name"])
    found = {"name": without_places(name), "repo": repository(name)}
    rest = {key: value for key, value in record.items() if key != "name"}
    if isinstance(record.get("base"), Mapping):
        rest["base"] = published(record["base"])
    return {**found, **rest}


def repositories(record: Mapping[str, Any]) -> list[str]:
    """Every repository that the weights of a manifest's source come from. Manifests of 0.1 have names only."""
    names = [record["repo"] if "repo" in record else repository(str(record["name"]))]
    if isinstance(record.get("base"), Mapping):
        names += repositories(record["base"])
    return [name for name in dict.fromkeys(names) if name and REPOSITORY.fullmatch(name)]


def forget_places(config: dict[str, Any]) -> bool:
    """Take away the keys of a component's config, and of the configs in it, that name a place; whether there were any.

    A hub id stays: it is lineage.
    """
    found = [key for key in NAME_KEYS if isinstance(config.get(key), str) and is_place(config[key])]
    for key in found:
        del config[key]
    inner = [forget_places(value) for value in config.values() if isinstance(value, dict)]
    return bool(found) or any(inner)
