"""Captions of a folder in one table, as the hub's imagefolders have them: metadata.jsonl, .csv, .tsv or .parquet.

A table speaks of the pictures in its folder and below: column `file_name` holds the path, relative to the table. So do
the columns of `beside`: they name what an edited picture was made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import beside, prompt_lists, tables

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
FILE = "file_name"


def captions(root: Path, pictures: Iterable[Path], column: str | None = None) -> dict[Path, str]:
    """File -> caption, from the tables that speak of the ``pictures`` below ``root``.

    Args:
        column: of the captions; None: the first of `prompt_lists.COLUMNS`.
    Raises:
        InputError: a table is damaged, or has no such columns.
    """
    found: dict[Path, str] = {}
    for table in _tables(root, pictures):
        found |= dict(_rows(table, column))
    return found


def sources(root: Path, pictures: Iterable[Path]) -> dict[Path, tuple[Path, ...]]:
    """File -> what it was made from, from the same tables; those without such a column say nothing.

    Raises:
        InputError: a table is damaged.
    """
    found: dict[Path, tuple[Path, ...]] = {}
    for table in _tables(root, pictures):
        names = tables.columns(table)
        wanted = beside.columns(names)
        if not wanted or FILE not in names:
            continue
        for _, row in tables.rows(table, [FILE, *wanted]):
            own = beside.values(row, wanted)
            if isinstance(row.get(FILE), str) and own and all(isinstance(one, str) for one in own):
                found[table.parent / row[FILE]] = tuple(table.parent / one for one in own)
    return found


def _tables(root: Path, pictures: Iterable[Path]) -> Iterator[Path]:
    """The tables that speak of the ``pictures``; one that is nearer to a picture comes later, and counts."""
    folders = {folder for picture in pictures for folder in picture.parents if folder == root or root in folder.parents}
    yield from (folder / name for folder in sorted(folders) for name in NAMES if (folder / name).is_file())


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
