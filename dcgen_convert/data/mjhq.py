"""MJHQ-30K (data set playgroundai/MJHQ-30K of the hub): prompts and reference pictures; subsets are those of DC-Gen.

meta_data.json      {id: {"category", "prompt"}}
mjhq30k_imgs.zip    CATEGORY/ID.jpg; or the same folders, unpacked, beside meta_data.json or in mjhq30k_imgs/
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy
from PIL import Image

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import hashes, read_object, understood
from dcgen_convert.data import decoding, images

if TYPE_CHECKING:
    from torch import Tensor

META, ARCHIVE, UNPACKED = "meta_data.json", "mjhq30k_imgs.zip", "mjhq30k_imgs"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
FETCH = "hf download --repo-type dataset playgroundai/MJHQ-30K --local-dir FOLDER"


@dataclass(frozen=True)
class Prompt:
    """One prompt of the set, with the name of its reference picture."""

    category: str
    id: str
    prompt: str


@dataclass(frozen=True)
class Mjhq:
    """The set in a folder.

    Attributes:
        entries: all, sorted by (category, id).
    """

    folder: Path
    entries: list[Prompt]
    _files: dict[tuple[str, str], str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def has_pictures(self) -> bool:
        """Whether the folder has the archive of the pictures, or some of them."""
        return (self.folder / ARCHIVE).is_file() or bool(_index(self.folder))

    def subset(self, count: int) -> list[Prompt]:
        """The ``count`` entries that the authors' evaluation takes, in its order.

        It is numpy's RandomState(0).choice of the numbers of `entries`, without replacement.

        Raises:
            InputError: the set has fewer.
        """
        if not 1 <= count <= len(self.entries):
            raise InputError(
                f"{self.folder} has {len(self.entries):,} prompts, and {count:,} are asked for", "ask for fewer"
            )
        order = numpy.random.RandomState(0).choice(len(self.entries), count, replace=False)
        return [self.entries[number] for number in order]

    def pictures(self, entries: Sequence[Prompt], side: int) -> Iterator[Tensor]:
        """The reference pictures of ``entries`` one by one, (3, side, side) float32 in [-1, 1], as `images.fitted`.

        They are read out of the archive where the folder has one; nothing is unpacked.

        Raises:
            InputError: one is missing or damaged. Missing ones are found before the first is read.
        """
        names = [self._name(entry) for entry in entries]
        if (self.folder / ARCHIVE).is_file():
            with _opened(self.folder / ARCHIVE) as archive:
                for name in names:
                    yield images.fitted(_decoded(archive, name), side, side)
        else:
            for name in names:
                yield images.fitted(decoding.decode(self.folder / name)[0], side, side)

    def keys(self) -> list[str]:
        """A hash of every picture's bytes: of those in the archive the one that its table of contents has (CRC-32)."""
        names = [self._name(entry) for entry in self.entries]
        if not (self.folder / ARCHIVE).is_file():
            return hashes(self.folder / name for name in names)
        with _opened(self.folder / ARCHIVE) as archive:
            return [f"{found.CRC:08x} {found.file_size} {name}" for name in names for found in [archive.getinfo(name)]]

    def _name(self, entry: Prompt) -> str:
        """Name of an entry's picture in the archive or below the folder."""
        if not self._files:
            self._files.update(_index(self.folder))
        name = self._files.get((entry.category, entry.id))
        if name is None:
            raise InputError(f"{self.folder} has no picture {entry.category}/{entry.id}.jpg", FETCH)
        return name


def read(folder: Path) -> Mjhq:
    """The set in ``folder``.

    Raises:
        InputError: the folder has no meta_data.json, or it is damaged.
    """
    folder = folder.expanduser()
    file = folder / META
    if not file.is_file():
        raise InputError(f"{folder} has no {META}, so it is no folder of MJHQ-30K", FETCH)
    entries = []
    document = read_object(file)
    with understood(file, FETCH):
        for name, record in document.items():
            if not isinstance(record["category"], str) or not isinstance(record["prompt"], str):
                raise ValueError(f"category and prompt of {name[:80]!r} must be texts")
            entries.append(Prompt(record["category"], name, record["prompt"]))
    if not entries:
        raise InputError(f"{file} names no prompts", FETCH)
    return Mjhq(folder, sorted(entries, key=lambda entry: (entry.category, entry.id)))


def _index(folder: Path) -> dict[tuple[str, str], str]:
    """(category, id) -> name of the picture, of all in the archive, else of all below the folder."""
    if (folder / ARCHIVE).is_file():
        with _opened(folder / ARCHIVE) as archive:
            return _keyed(archive.namelist())
    root = folder / UNPACKED if (folder / UNPACKED).is_dir() else folder
    return _keyed(Path(os.path.relpath(file, folder)).as_posix() for file in sorted(root.glob("*/*")))


def _keyed(names: Iterable[str]) -> dict[tuple[str, str], str]:
    found = {}
    for name in names:
        path = PurePosixPath(name)
        if path.suffix.lower() in SUFFIXES and path.parts[0] != "__MACOSX":  # what macOS adds to an archive
            found[path.parent.name, path.stem] = name
    return found


def _opened(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise InputError(f"{file} is no whole zip archive: {error}", FETCH) from error


def _decoded(archive: zipfile.ZipFile, name: str) -> Image.Image:
    try:
        with Image.open(BytesIO(archive.read(name)), formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"the picture {name} in {archive.filename} cannot be read: {reason}", FETCH) from error
