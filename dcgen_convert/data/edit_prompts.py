"""What a model that edits is asked for: instructions, each with the pictures that it is given.

`tiny-edits` draws both. A table with sources (columns as `beside` knows them) and a column of instructions holds both:
rows {image, source, caption}, the image is not looked at. Any other list of instructions goes with a folder of
pictures: the first instruction edits the first picture, and so on; where instructions are more, the pictures are used
again.

A model that draws videos from a picture is asked in the same forms. Its texts describe the video, so they are captions,
and `tiny-videos` draws the first frame of every video that it describes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import hashes
from dcgen_convert.core.journal import fingerprint
from dcgen_convert.data import beside, decoding, drawn, drawn_edits, gathering, prompt_lists, prompts, tables

HELP = (
    "--prompts FILE of instructions with --sources FOLDER of pictures; or --prompts FILE.jsonl with a source and a "
    "caption in each row"
)


@dataclass(frozen=True)
class Edit:
    """One edit that is asked for. files: the pictures that are given, in their order; digest: of their bytes."""

    text: str
    files: tuple[Path, ...]
    digest: str


def make(  # noqa: PLR0913  all that a list of edits is made from
    kind: str | None,
    sources: str | None,
    count: int,
    seed: int,
    *,
    most: int,
    folder: Path,
    side: int,
    offline: bool = False,
    moving: bool = False,
) -> list[Edit]:
    """``count`` edits. A larger count begins with the same ones.

    Args:
        kind: "tiny-edits", a table, or what `prompt_lists.read` takes; None: nothing is known. Of videos "tiny-videos"
            in place of "tiny-edits".
        sources: folder of the pictures that are edited; None: ``kind`` says them.
        most: pictures that the model takes with an instruction.
        folder: where pictures of the tiny world are drawn, at ``side`` px.
        offline: take a data set of the hub from the cache only.
        moving: the model draws videos from a picture.
    Raises:
        InputError, AccessError: captions in place of instructions, a picture that is not there or cannot be read, or
            more of them than the model takes; else as `prompt_lists.read`.
    """
    own = drawn.VIDEOS if moving else drawn_edits.WORD
    if kind is None or (kind in prompts.KINDS and kind != own):
        what = "draws videos from a picture" if moving else "edits pictures"
        given = "no pictures" if moving else "captions, no instructions"
        raise InputError(f"the model {what}, and {f'{kind} gives {given}' if kind else 'nothing says how'}", HELP)
    files: list[tuple[Path, ...]]
    rows = None if kind == own else _rows(kind, most)
    if sources is not None and (rows or kind == own):
        raise InputError(f"{kind} says itself which pictures are edited", "leave --sources out")
    if kind == own:
        texts, place = prompts.make(kind, count, seed), folder / f"{kind}-{seed}-{side}"
        if moving:
            files = [(file,) for file in drawn.first_frames(place, texts, seed, side)]
        else:
            files = [(file,) for file in drawn_edits.draw(place, count, seed, side)]
    elif rows:
        ordered = sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row}".encode()).digest())
        chosen, folder = [*islice(cycle(ordered), count)], prompt_lists.place_of(kind)[0].absolute().parent
        texts = [text for text, _ in chosen]
        files = [tuple(folder / name for name in names) for _, names in chosen]
    elif sources is None:
        raise InputError(f"{kind} gives instructions, and nothing says which pictures are edited", HELP)
    else:
        texts = prompts.make(kind, count, seed, offline=offline)
        files = [(file,) for file in islice(cycle(pictures_of(sources, "--sources")), count)]
    return _read(texts, files)


def usual(kind: str | None, moving: bool = False) -> str | None:
    """``kind`` where it brings pictures on every machine; None for others, and for a list of somebody's."""
    return kind if kind == (drawn.VIDEOS if moving else drawn_edits.WORD) else None


def asked_of(fewest: int, most: int, kind: str | None, sources: str | None) -> bool:
    """Whether a model is asked for edits that takes ``fewest`` to ``most`` pictures: always where it must be given one;
    where it may be given some, if pictures are named.
    """
    named = sources is not None or kind == drawn_edits.WORD or (kind is not None and _has_sources(kind))
    return bool(fewest or (most and named))


def _has_sources(kind: str) -> bool:
    """Whether ``kind`` is a table with sources."""
    path, _ = prompt_lists.place_of(kind)
    return path.suffix.lower() in tables.SUFFIXES and path.is_file() and bool(beside.columns(tables.columns(path)))


def pictures_of(folder: str, option: str) -> list[Path]:
    """The pictures in a folder that the user names with ``option``, in the order of their names.

    Raises:
        InputError: there is no such folder, or it holds no pictures.
    """
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise InputError(f"{path} is not a folder", f"{option} names a folder of pictures to edit")
    files = gathering.gather(path)[0]
    if not files:
        raise InputError(f"{path} holds no pictures", f"{option} names a folder of pictures to edit")
    return files


def _read(texts: Sequence[str], files: Sequence[tuple[Path, ...]]) -> list[Edit]:
    """The edits with the hashes of their pictures; InputError for one that is no picture."""
    every = list(dict.fromkeys(file for own in files for file in own))
    for file in every:
        with decoding.opened(file):  # the head alone
            pass
    digests = dict(zip(every, hashes(every), strict=True))
    return [
        Edit(text, own, fingerprint([digests[file] for file in own])) for text, own in zip(texts, files, strict=True)
    ]


def _rows(kind: str, most: int) -> list[tuple[str, tuple[str, ...]]] | None:
    """(instruction, names of its pictures) of every row of a table, each once; None for what holds no sources."""
    if not _has_sources(kind):
        return None
    path, column = prompt_lists.place_of(kind)
    names = tables.columns(path)
    column = prompt_lists.column_of(names, column)
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    for number, row in tables.rows(path, [name for name in (column, *beside.columns(names)) if name in names]):
        try:
            text, sources = prompt_lists.text_of(row.get(str(column))), _names(row)
        except ValueError as error:
            raise InputError(f"{path} row {number}: {error}", HELP) from error
        if not text or not 1 <= len(sources) <= most:
            said = f"{len(sources)} sources, and the model takes {most}" if text else "no instruction"
            raise InputError(f"{path} row {number} has {said}", HELP)
        found[text, sources] = None
    return list(found)


def _names(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Files of the sources of a row; ValueError where something else stands."""
    found = beside.columns([*row])
    values = beside.values(row, found)
    for value in values:
        if not isinstance(value, str):
            raise ValueError(
                f"{' and '.join(found)} must hold names of files, not {json.dumps(value, default=str)[:60]}"
            )
    return tuple(values)
