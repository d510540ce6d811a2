"""The weight files of a component's folder, by name: plain files before precision variants, an index with its shards.

diffusers has written the variant before the shard's number (`model.fp16-00001-of-00002.safetensors`), and older
versions behind it (`model-00001-of-00002.fp16.safetensors`). An index has it in its last or its first suffix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object

SUFFIX = ".safetensors"
_SHARD = r"-\d{5}-of-\d{5}"
_VARIANT = re.compile(rf"(?P<early>{_SHARD})?\.(?P<variant>[a-z0-9_]+)(?P<shard>{_SHARD})?\.safetensors$")
_INDEX = re.compile(r"(\.(?P<early>[a-z0-9_]+))?\.safetensors\.index(\.(?P<variant>[a-z0-9_]+))?\.json$")


def variant(name: str) -> str | None:
    """The precision variant that a weight file or an index is of; None for a plain one and for any other file."""
    if found := _INDEX.search(name):
        return found["variant"] or found["early"]
    found = _VARIANT.search(name)
    return found["variant"] if found else None


def plain(name: str) -> str:
    """``name`` without its variant."""
    name = _INDEX.sub(".safetensors.index.json", name)
    return _VARIANT.sub(lambda found: f"{found['early'] or found['shard'] or ''}.safetensors", name)


def is_index(name: str) -> bool:
    """Whether a file is an index of safetensors shards, of whatever variant."""
    return _INDEX.search(name) is not None


def chosen(names: Iterable[str], folder: Path) -> list[str]:
    """The safetensors files and the index that a folder is loaded from, of all its files ``names``.

    An index of which no shard is there is left out when a single file can be loaded instead: it was left behind when
    the shards were put together.

    Raises:
        InputError: several variants and no plain file, or an index that is damaged.
    """
    found = sorted(name for name in names if not name.startswith(".") and (name.endswith(SUFFIX) or is_index(name)))
    files = _of_one_variant([name for name in found if not is_index(name)], folder)
    kinds = {variant(name) for name in files}
    indexes = [name for name in found if is_index(name) and (variant(name) in kinds or not files)]
    if not indexes:
        return files
    shards = set(weight_map(folder / indexes[0]).values())
    if not shards & set(files) and len(files) == 1:
        return files
    return [indexes[0], *(name for name in files if name in shards)]


def _of_one_variant(files: list[str], folder: Path) -> list[str]:
    """The plain files, or those of the only variant."""
    without = [name for name in files if variant(name) is None]
    kinds = sorted({found for name in files if (found := variant(name))})
    if not without and len(kinds) > 1:
        raise InputError(f"{folder} holds the variants {', '.join(kinds)} and no plain weights", "keep one of them")
    return without or files


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, of an index; InputError when it is damaged or names a file of another folder."""
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise InputError(f"{index} is no index of shards", "fetch the checkpoint again")
    for shard in found.values():
        if Path(shard).name != shard or not shard.endswith(SUFFIX):
            raise InputError(f"{index} names the shard {shard}, which is no file of its folder", "fetch it again")
    return found
