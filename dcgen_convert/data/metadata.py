"""Captions of a folder in one table, as the hub's imagefolders have them: metadata.jsonl, .csv or .parquet.

A table speaks of the pictures in its folder and below: column `file_name` holds the path, relative to the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import prompt_lists, tables

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE = "file_name"


def captions(root: Path, pictures: Iterable[Path], column: str | None = None) -> dict[Path, str]:
    """File -> caption, from the tables that speak of the ``pictures`` below ``root``.

    Args:
        column: of the captions; None: the first of `prompt_lists.COLUMNS`.
    Raises:
        InputError: a table is damaged, or has no such columns.
    """
    folders = {folder for picture in pictures for folder in picture.parents if folder == root or root in folder.parents}
    found: dict[Path, str] = {}
    for folder in sorted(folders):  # a table that is nearer to the picture comes later, and counts
        for name in NAMES:
            if (folder / name).is_file():
                found |= dict(_rows(folder / name, column))
    return found


def _rows(table: Path, column: str | None) -> Iterable[tuple[Path, str]]:
    names = tables.columns(table)
    caption = prompt_lists.column_of(names, column)
    for wanted in (FILE, caption):
        if wanted not in names:
            missing = wanted or " or ".join(prompt_lists.COLUMNS)
            raise InputError(
                f"{table} has no column {missing}; it has {', '.join(names[:12])}",
                f"{FILE} names the picture, and {', '.join(prompt_lists.COLUMNS)} or PATH:COLUMN the caption",
            )
    for number, row in tables.rows(table, [FILE, str(caption)]):
        try:
            file, text = prompt_lists.text_of(row.get(FILE)), prompt_lists.text_of(row.get(str(caption)))
        except ValueError as error:
            raise InputError(f"{table} row {number}: a value {error}", "correct the row") from error
        yield table.parent / file, text
