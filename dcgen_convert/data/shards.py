"""Pictures in shards, or videos: .tar as webdataset writes them, and .parquet with their bytes in a column.

The chosen pictures are copied into a folder, byte by byte as they are; those of a model that edits with their sources,
which `beside` names. A name in a shard is never a path: the copies are numbered. Archives are read without
decompression, links and devices in them are left out, and no more than one picture is in memory. (A row group of a
.parquet is read as a whole by pyarrow: that is how the format works.)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import beside, gathering, prompt_lists, tables
from dcgen_convert.data.tally import Tally

TAR, PARQUET = ".tar", ".parquet"
SUFFIXES = (PARQUET, TAR)
CAPTION_PARTS = ("txt", "caption", "text", "json", "cls")  # of a webdataset sample; the first that is there counts
PICTURE_COLUMNS = ("image", "jpg", "png", "picture", "img")
VIDEO_COLUMNS = ("video", "mp4")
# Of edits, as published data sets name them: InstructPix2Pix, HQ-Edit, MagicBrush, OmniEdit.
EDITED_COLUMNS = ("edited_image", "output_image", "target_image", "target_img", "edited_img")
LOOKED_AT = 64  # samples of a shard in which references are counted for a plan
LONGEST = 1 << 20  # bytes of a caption or of the .json beside a picture
NO_CAPTION = "because they have no caption"
NO_PICTURE = {False: "because they hold no picture", True: "because they hold no video"}
NO_FILE = "because they are links, devices or sparse files in an archive"
MAGIC = {
    b"\x89PNG": ".png",
    b"\xff\xd8": ".jpg",
    b"RIFF": ".webp",
    b"GIF8": ".gif",
    b"BM": ".bmp",
    b"\x1aE\xdf\xa3": ".mkv",
}
BRAND = b"ftyp"  # from byte 4 on: .mp4 and .mov


@dataclass
class Sample:
    """One sample of a shard: its number there, its parts by suffix (.tar), or its row (.parquet, if it was read)."""

    number: int
    parts: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)


def find(place: Path) -> list[Path]:
    """The shards of a folder, sorted, or the shard itself; empty where there are none."""
    if place.is_file():
        return [place] if place.suffix.lower() in SUFFIXES else []
    return sorted(
        path
        for path in place.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith((".", "metadata."))
    )


def label(shard: Path, root: Path) -> str:
    """A name of one folder for a shard: the same wherever ``root`` lies."""
    name = os.path.relpath(shard, root) if shard != root else shard.name
    return re.sub(r"[^\w.-]", "_", name)[-60:] + "-" + hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def count(shard: Path) -> int:
    """How many samples a shard has; no picture is read."""
    if shard.suffix.lower() == PARQUET:
        with tables.Parquet(shard) as file:
            return int(file.metadata.num_rows)
    return sum(1 for _ in _samples(shard, Tally()))


def most_references(shard: Path) -> int:
    """Most pictures that one of the first samples of a shard was made from."""
    if shard.suffix.lower() == PARQUET:
        if not (found := beside.columns(tables.columns(shard))):
            return 0
        counts = (len(_given(row, found)) for _, row in tables.rows(shard, found))
    else:
        counts = (len(_sources(sample)) for sample in _samples(shard, Tally()))
    return max(islice(counts, LOOKED_AT), default=0)


def extract(
    shard: Path,
    wanted: set[int],
    folder: Path,
    column: str | None,
    left_out: Tally,
    edited: bool = False,
    moving: bool = False,
) -> Iterator[tuple[str, str, list[str]]]:
    """Copy the samples ``wanted`` into ``folder``, those that are not there yet: (name in the folder, caption, names of
    what it was made from) of each.

    Args:
        edited: whether to copy what an edited picture was made from too.
        moving: whether the samples hold videos.
    Raises:
        InputError: the shard is damaged, or has no such column.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = _from_parquet if shard.suffix.lower() == PARQUET else _from_tar
    yield from taken(shard, wanted, folder, column, left_out, edited, moving)


def _from_parquet(
    shard: Path, wanted: set[int], folder: Path, column: str | None, left_out: Tally, edited: bool, moving: bool
) -> Iterator[tuple[str, str, list[str]]]:
    names = tables.columns(shard)
    known, noun = (VIDEO_COLUMNS, "videos") if moving else (PICTURE_COLUMNS, "pictures")
    picture = next((name for name in (*known, *(() if moving else EDITED_COLUMNS)) if name in names), None)
    caption = prompt_lists.column_of(names, column)
    for kind, found in ((noun, picture), ("captions", caption)):
        if found not in names:
            raise InputError(
                f"{shard} has no column of {kind}; it has {', '.join(names[:12])}",
                f"known are {', '.join(known)} for {noun}, {', '.join(prompt_lists.COLUMNS)} for captions; "
                "PATH:COLUMN names the column of captions",
            )
    sources = beside.columns(names) if edited else []
    for row_number, row in tables.rows(shard, [str(picture), str(caption), *sources]):
        number = row_number - 1
        if number not in wanted:
            continue
        cell, shown = row[str(picture)], f"{shard.name} row {row_number}"
        content = _bytes(cell)
        text = _text(row[str(caption)], shown)
        if content is None:
            left_out.add(NO_PICTURE[moving], shown)
        elif text is None:
            left_out.add(NO_CAPTION, shown)
        else:
            name = f"{number:07d}{_suffix(content)}"
            _write(folder / name, content)
            made_from = []
            for place, source in enumerate(_given(row, sources), 1):
                if (content := _bytes(source)) is None:
                    raise InputError(
                        f"{shown}: its {sources[0]} {place} holds no bytes of a picture",
                        "embed the pictures in the table, or use a .jsonl with their files",
                    )
                made_from.append(_source_name(number, place, _suffix(content)))
                _write(folder / made_from[-1], content)
            yield name, text, made_from


def _from_tar(
    shard: Path, wanted: set[int], folder: Path, column: str | None, left_out: Tally, edited: bool, moving: bool
) -> Iterator[tuple[str, str, list[str]]]:
    with _archive(shard) as tar:
        for sample in _members(tar, left_out):
            if sample.number not in wanted:
                continue
            sources = _sources(sample)
            known = (part for part in sample.parts if _is_one(part, moving) and not beside.number(part))
            suffix = next(known, None)
            shown = f"{shard.name} sample {sample.number}"
            text = _caption(tar, sample, column, shown)
            if suffix is None:
                left_out.add(NO_PICTURE[moving], shown)
            elif text is None:
                left_out.add(NO_CAPTION, shown)
            else:
                name = f"{sample.number:07d}.{suffix.rpartition('.')[2]}"
                copied = {name: suffix}
                for place, part in sorted(sources.items()) if edited else ():
                    copied[_source_name(sample.number, place, f".{part.rpartition('.')[2]}")] = part
                for file, part in copied.items():
                    if not (folder / file).exists():
                        with _whole(folder / file) as opened:
                            shutil.copyfileobj(_content(tar, sample.parts[part]), opened)
                yield name, text, [file for file in copied if file != name]


def _given(row: dict[str, Any], columns: list[str]) -> list[Any]:
    """The sources in ``columns`` of a row of a .parquet. Texts alone are no pictures."""
    found = beside.values(row, columns)
    return [] if all(isinstance(one, str) for one in found) else found


def _is_one(part: str, moving: bool) -> bool:
    """Whether a part is a picture, or a video."""
    return f".{part.rpartition('.')[2]}" in gathering.suffixes(moving)


def _sources(sample: Sample) -> dict[int, str]:
    """Number of a source, from 1 on -> the part that holds it."""
    return {place: part for part in sample.parts if _is_one(part, False) and (place := beside.number(part))}


def _samples(shard: Path, left_out: Tally) -> Iterator[Sample]:
    with _archive(shard) as tar:
        yield from _members(tar, left_out)


def _members(tar: tarfile.TarFile, left_out: Tally) -> Iterator[Sample]:
    """Neighbours with the same name up to the first dot are one sample."""
    before, sample = None, Sample(-1)
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would keep every one
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if not stem or member.isdir():
            continue  # hidden, or a folder
        if not member.isreg() or member.issparse():
            left_out.add(NO_FILE, f"{Path(str(tar.name)).name} {name[:40]}")
            continue
        if (folder, stem) != before:
            if sample.parts:
                yield sample
            before, sample = (folder, stem), Sample(sample.number + 1)
        sample.parts.setdefault(suffix.lower(), member)
    if sample.parts:
        yield sample


@contextmanager
def _archive(shard: Path) -> Iterator[tarfile.TarFile]:
    """An open .tar that is not compressed; whatever is wrong with it is an InputError that names it."""
    try:
        with tarfile.open(shard, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            yield tar
    except InputError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, EOFError, LookupError) as error:
        raise InputError(f"{shard} is damaged, or no plain .tar: {error}", "fetch it again, or unpack it") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    found = tar.extractfile(member)
    assert found is not None, "a regular file"
    return found


def _caption(tar: tarfile.TarFile, sample: Sample, column: str | None, shown: str) -> str | None:
    """The text of a sample; of its .json the column, else the first of `prompt_lists.COLUMNS`. None without one."""
    for part in ("json",) if column else CAPTION_PARTS:
        member = sample.parts.get(part)
        if member is None or member.size > LONGEST:
            continue
        try:
            text = _content(tar, member).read().decode("utf-8-sig")
            if part != "json":
                return text.strip()
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{shown}: its .{part} cannot be read: {error}", "correct it, or take it out") from error
        names = [column] if column else prompt_lists.COLUMNS
        name = next((name for name in names if isinstance(row, dict) and name in row), None)
        if name is not None:
            return _text(row[name], shown)
    return None


def _text(value: Any, shown: str) -> str | None:
    """A value as caption; None where there is none."""
    if value is None:
        return None
    try:
        return prompt_lists.text_of(value)
    except ValueError as error:
        raise InputError(f"{shown}: its caption {error}", "name a column of texts: PATH:COLUMN") from error


def _bytes(cell: Any) -> bytes | None:
    """The bytes of a picture in a cell of a .parquet; None where there are none."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else None


def _source_name(number: int, place: int, suffix: str) -> str:
    """Name of a copy: source ``place`` of a sample."""
    return f"{number:07d}.{beside.SOURCE}{f'-{place}' if place > 1 else ''}{suffix}"


def _write(file: Path, content: bytes) -> None:
    if not file.exists():
        with _whole(file) as opened:
            opened.write(content)


def _suffix(content: bytes) -> str:
    """Of the format that the first bytes of a file state."""
    other = ".mp4" if content[4:8] == BRAND else ".img"
    return next((suffix for magic, suffix in MAGIC.items() if content.startswith(magic)), other)


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears when it is whole."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "wb") as file:
        yield file
    os.replace(temporary, path)
