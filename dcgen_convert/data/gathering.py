"""Finding the pictures of a folder, or its videos: what is taken, and what is left out and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from dcgen_convert.core.names import LOCK, MANIFEST, RECIPE
from dcgen_convert.data import decoding, videos
from dcgen_convert.data.tally import Tally

FORMAT = "because of their format"
FOREIGN = "because they are hidden or belong to another program"
OWN = "because this program wrote them"
AGAIN = "because they are links to a folder that is read already"
ALONE = "because no picture belongs to these captions"
CAPTION = ".txt"
SYSTEM = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
UNREAD = {
    *(".heic", ".heif", ".hif", ".jxl", ".svg", ".pdf", ".exr", ".hdr", ".xcf", ".ai"),
    *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw"),
}
"""Suffixes of pictures that Pillow does not know."""
OTHER_VIDEOS = {".avi", ".wmv", ".flv", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts", ".ogv", ".3gp"}


def suffixes(moving: bool = False) -> frozenset[str]:
    """Suffixes of what is taken, in small letters: pictures, or videos."""
    return videos.suffixes() if moving else decoding.suffixes()


def gather(root: Path, moving: bool = False) -> tuple[list[Path], Tally]:
    """The picture files below ``root``, sorted, and what was left out.

    Args:
        moving: find videos in their place, files and folders of frames.
    """
    left_out, found = Tally(), []
    for folder, names in _folders(root, left_out, suffixes(moving)):
        if moving and folder != root and videos.is_frames(names):
            found.append(folder)
            continue
        pictures = [name for name in names if Path(name).suffix.lower() in suffixes(moving)]
        found += [folder / name for name in pictures]
        stems = {Path(name).stem for name in [*pictures, *(_names_of_folders(folder) if moving else ())]}
        for name in sorted(set(names) - set(pictures)):
            suffix, shown = Path(name).suffix.lower(), str((folder / name).relative_to(root))
            if suffix in _unread(moving):
                left_out.add(FORMAT, shown)
                stems.add(Path(name).stem)
        for name in names:
            if Path(name).suffix.lower() == CAPTION and Path(name).stem not in stems:
                left_out.add(ALONE, str((folder / name).relative_to(root)))
    return sorted(found), left_out


def caption_file(picture: Path) -> Path | None:
    """The caption beside a picture; its suffix may be in capitals."""
    for suffix in (CAPTION, CAPTION.upper()):
        if (file := picture.with_suffix(suffix)).is_file():
            return file
    return None


def _names_of_folders(folder: Path) -> list[str]:
    """Of the folders in ``folder``, which may be the frames of a video."""
    return [inner.name for inner in folder.iterdir() if inner.is_dir()]


@cache
def _unread(moving: bool) -> frozenset[str]:
    """Suffixes of pictures that are left out; or of videos, beside which pictures are left out too."""
    Image.init()
    if moving:
        return frozenset({*OTHER_VIDEOS, *decoding.suffixes()})
    return frozenset({*UNREAD, *Image.registered_extensions()} - decoding.suffixes())


def _folders(root: Path, left_out: Tally, wanted: frozenset[str]) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below ``root`` with the sorted names of its files. Links are followed, each folder is met once.

    Args:
        wanted: suffixes of files that are told of where they are left out.
    """
    waiting, seen = [root], set()
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            left_out.add(AGAIN, f"{folder.relative_to(root)}{os.sep}")
            continue
        seen.add((status.st_dev, status.st_ino))
        files: list[str] = []
        folders: list[str] = []
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                (folders if _is_folder(entry) else files).append(entry.name)
        kept = [name for name in files if not _is_foreign(name)]
        for name in sorted(set(files) - set(kept)):
            if Path(name).suffix.lower() in wanted:
                left_out.add(FOREIGN, str((folder / name).relative_to(root)))
        yield folder, kept
        for name in reversed(folders):
            inner = folder / name
            shown = f"{inner.relative_to(root)}{os.sep}"
            if _is_foreign(name):
                left_out.add(FOREIGN, shown)
            elif is_own(inner):
                left_out.add(OWN, shown)
            else:
                waiting.append(inner)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also for a link to a folder; a link that leads to itself is none."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_foreign(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def is_own(folder: Path) -> bool:
    """Whether this program wrote ``folder``: a run folder or a bundle."""
    return (folder / MANIFEST).is_file() or all((folder / name).is_file() for name in (RECIPE, LOCK))
