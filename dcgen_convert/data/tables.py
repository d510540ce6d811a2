"""Rows of tables: .jsonl, .csv, .tsv and .parquet, read one after the other and never as a whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import require_regular

SUFFIXES = (".csv", ".jsonl", ".parquet", ".tsv")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
BATCH = 64  # rows of a .parquet that are held at once: they may hold pictures


def columns(path: Path) -> list[str]:
    """Names of the columns; of a .jsonl those of its first row. Empty where there are no rows."""
    if path.suffix.lower() == ".parquet":
        with Parquet(path) as file:
            return list(file.schema_arrow.names)
    return next(([*row] for _, row in rows(path)), [])


def rows(path: Path, wanted: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of every row; the number is that of its line, or of the row in a .parquet, from 1 on.

    Args:
        wanted: columns to read; None: all.
    Raises:
        InputError: the file is missing or damaged, or a line is no row (with its number); or pyarrow is not
            installed, for a .parquet.
    """
    require_regular(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist", "correct the path")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, wanted)
    return _jsonl(path) if suffix == ".jsonl" else _separated(path, DELIMITERS[suffix])


def _parquet(path: Path, wanted: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with Parquet(path) as file:
        for batch in file.iter_batches(BATCH, columns=None if wanted is None else list(wanted)):
            for row in batch.to_pylist():
                number += 1
                yield number, row


class Parquet:
    """An open .parquet file. Whatever pyarrow raises about it is an InputError that names the file."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise InputError(f"{path} needs the package pyarrow", "pip install 'dcgen-convert[data]'") from error
        self.path, self.parquet = path, pyarrow.parquet

    def __enter__(self) -> Any:
        import pyarrow

        try:
            self.file = self.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _damaged(self.path, error) from error
        return self.file

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import pyarrow

        self.file.close()
        if isinstance(error, pyarrow.ArrowException | OSError) and not isinstance(error, InputError):
            raise _damaged(self.path, error) from error


def _damaged(path: Path, error: BaseException) -> InputError:
    return InputError(f"{path} is damaged: {' '.join(str(error).split())[:200]}", "fetch the file again")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text with its end) of every line of a UTF-8 file, with or without a byte order mark."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise InputError(f"{path} line {number} holds a zero byte", "save the file as UTF-8 text")
                yield number, line
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text, after line {number}", "save the file as UTF-8") from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is no JSON: {error}", "write one object per line") from error
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is no object", "write one object per line")
        yield number, row


def _separated(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(_texts(_lines(path)), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if len(set(names)) < len(names):
            raise InputError(f"{path} names a column twice", "give every column a name of its own")
        for row in reader:
            if len(row) > len(names):
                raise InputError(
                    f"{path} line {reader.line_num} has {len(row)} values for {len(names)} columns",
                    "put a value that holds the separator in double quotes",
                )
            if row:
                yield reader.line_num, dict(zip(names, row, strict=False))
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num} cannot be read: {error}", "correct the line") from error


def _texts(lines: Iterable[tuple[int, str]]) -> Iterator[str]:
    for _, line in lines:
        yield line.replace("\r\n", "\n")
