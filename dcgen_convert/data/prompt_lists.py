"""Prompts that the user gives: FILE, FILE:COLUMN, a folder of such files, or a data set of the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_lines
from dcgen_convert.data import hub, tables

COLUMNS = ("prompt", "caption", "text")  # the column that is read unless one is named: the first of these
TEXT = ".txt"
COMMENT = "#"
KINDS = (TEXT, *tables.SUFFIXES)
FORM = "FILE.txt with one prompt per line, FILE:COLUMN of a .jsonl, .csv, .tsv or .parquet, or builtin"


@dataclass(frozen=True)
class PromptList:
    """texts: each prompt once; rows: prompts that were read; empty: rows without a text, which do not count."""

    texts: tuple[str, ...]
    rows: int
    empty: int

    def told(self, name: str, count: int) -> str:
        """What the user should know when ``count`` pictures are drawn from it; "" where there is nothing to tell."""
        distinct, notes = len(self.texts), []
        if repeated := self.rows - distinct:
            notes.append(f"{repeated} of its {self.rows} prompts are repetitions and are left out")
        if self.empty:
            notes.append(f"{self.empty} rows are empty")
        if distinct < count:
            notes.append(f"{distinct} prompts for {count} pictures: they are used again, with other noise")
        elif distinct > count:
            notes.append(f"{distinct} prompts for {count} pictures: {distinct - count} are not used")
        return f"{name}: {'; '.join(notes)}" if notes else ""


def read(name: str, offline: bool = False) -> PromptList:
    """The prompts that a user's ``name`` stands for; see the module.

    Raises:
        InputError: nothing there, no such column, no text, or a file that is damaged.
        AccessError: a data set that is neither in the cache nor reachable.
    """
    place, column = _place(name, offline)
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if _is_list(file))
    if not files:
        raise InputError(f"{place} holds no prompts ({', '.join(KINDS)})", f"give {FORM}")
    texts: dict[str, None] = {}
    found = empty = 0
    for file in files:
        for text in _texts(file, column):
            if text:
                texts[text] = None
                found += 1
            else:
                empty += 1
    if not texts:
        raise InputError(f"prompts file {place} is empty", f"give {FORM}")
    return PromptList(tuple(texts), found, empty)


def ordered(texts: tuple[str, ...], seed: int) -> list[str]:
    """The texts shuffled by the seed. The order of two texts does not depend on the others."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())


def column_of(names: Sequence[str], column: str | None) -> str | None:
    """The column of captions: ``column``, or the first of COLUMNS that a table has; None without one."""
    return column or next((name for name in COLUMNS if name in names), None)


def split(name: str) -> tuple[str, str | None]:
    """`PLACE:COLUMN` -> both. A colon before a slash belongs to the place: that of hf:// too."""
    place, colon, column = name.rpartition(":")
    return (place, column) if colon and place and "/" not in column else (name, None)


def place_of(name: str) -> tuple[Path, str | None]:
    """The file or folder that a name stands for, and the column; of a name that is no address of the hub."""
    path = Path(name).expanduser()
    place, column = (name, None) if path.exists() else split(name)
    return Path(place).expanduser(), column


def require_here(name: str) -> None:
    """InputError for a file or folder that is not on this machine; a data set of the hub is found out later."""
    if not hub.is_address(name):
        _place(name, offline=True)


def _place(name: str, offline: bool) -> tuple[Path, str | None]:
    if hub.is_address(name):
        address, column = split(name)
        return hub.fetch(address, KINDS, offline), column
    path, column_named = place_of(name)
    if not path.exists():
        raise InputError(f"prompts file {path} does not exist", f"give {FORM}")
    if (path.is_file() and path.suffix.lower() in tables.SUFFIXES) or path.is_dir():
        return path, column_named
    if column_named is not None:
        raise InputError(f"{path} has no columns, so {column_named!r} cannot be one", f"give {FORM}")
    return path, None


def _is_list(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts[-2:])
    return file.suffix.lower() in KINDS and not hidden and file.is_file()


def _texts(file: Path, column: str | None) -> Iterator[str]:
    """Texts of one file, without the white space around them; "" for a row without one."""
    if file.suffix.lower() not in tables.SUFFIXES:
        for line in read_lines(file):
            if line.strip() and not line.lstrip().startswith(COMMENT):
                yield line.strip()
        return
    names = tables.columns(file)
    chosen = column_of(names, column)
    if names and chosen not in names:
        wanted = repr(column) if column else " or ".join(COLUMNS)
        raise InputError(
            f"{file} has no column {wanted}; it has {', '.join(names[:12])}", f"name one: {file.name}:COLUMN"
        )
    for number, row in tables.rows(file, [str(chosen)]) if names else ():
        try:
            yield text_of(row.get(str(chosen)))
        except ValueError as error:
            raise InputError(f"{file} row {number}: {chosen} {error}", "give a column of texts") from error


def text_of(value: Any) -> str:
    """A value of a table as text; "" for none. A number is one too: it may be a class. ValueError for other kinds."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"is no text: {str(value)[:60]!r}")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair") from None
    return text
