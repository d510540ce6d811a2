"""What an edited picture was made from, in every form of data: which columns, files and parts name it.

A table has the column `source`, or one of the names that published data sets have; a value is one picture or a list.
More stand in `source-2`, `source-3` and so on. Files and parts of an archive are named KEY.source.png,
KEY.source-2.png.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SOURCE = "source"
# InstructPix2Pix, HQ-Edit, MagicBrush, OmniEdit; the last as the hub's imagefolders name the files of a column.
COLUMNS = (SOURCE, "source_image", "original_image", "input_image", "source_img", "src_img", "source_file_name")
PART = re.compile(rf"{SOURCE}(?:-([2-9]|[1-9][0-9]+))?")


def columns(names: Sequence[str]) -> list[str]:
    """Those of a table's columns that hold sources, in the order of the references."""
    first = next((name for name in COLUMNS if name in names), None)
    more = sorted((int(found[1]), name) for name in names if (found := PART.fullmatch(name)) and found[1])
    return [first, *(name for _, name in more)] if first else []


def values(row: Mapping[str, Any], found: Iterable[str]) -> list[Any]:
    """The sources in the columns ``found`` of a row: lists are taken apart, empty cells left out."""
    cells = (row.get(name) for name in found)
    every = (one for cell in cells for one in (cell if isinstance(cell, list) else [cell]))
    return [one for one in every if one is not None and one != ""]


def number(part: str) -> int | None:
    """Number of the source that a part such as "source.png" or "source-2.jpg" is, from 1 on; None: it is none."""
    found = PART.fullmatch(part.rpartition(".")[0])
    return int(found[1] or 1) if found else None


def of_files(pictures: Sequence[Path]) -> dict[Path, tuple[Path, ...]]:
    """Picture -> its sources KEY.source.png, ... in the same folder, in their order."""
    named: dict[tuple[Path, str], Path] = {}
    for file in pictures:
        named.setdefault((file.parent, file.stem), file)
    found: dict[Path, dict[int, Path]] = {}
    for file in pictures:
        stem, _, end = file.stem.rpartition(".")
        place = number(f"{end}.") if stem else None
        if place and (owner := named.get((file.parent, stem))):
            found.setdefault(owner, {})[place] = file
    return {owner: tuple(file for _, file in sorted(own.items())) for owner, own in found.items()}
