"""What the file of a row shows: a picture, or a video where the model draws videos. Here both are read and written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from dcgen_convert.core import files as core_files
from dcgen_convert.data import decoding, images, videos

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, ...]  # (height, width) of a picture, (frames, height, width) of a video


def read(file: Path, sizes: Sequence[Size], fps: float = 0) -> list[Tensor]:
    """Pixels of a file, read once, at several sizes, all of pictures or all of videos: (3, *size) in [-1, 1] each.

    Args:
        fps: of a video of the user's own, as in `videos.read`.
    Raises:
        InputError: the file cannot be read, or is a video of fewer frames.
    """
    planes = [(size[-2], size[-1]) for size in sizes]
    if len(sizes[0]) == 2:
        return images.read_sizes(file, planes)
    every = videos.read_sizes(file, max(size[0] for size in sizes), planes, fps)
    return [seen[:, : size[0]] for seen, size in zip(every, sizes, strict=True)]


def size_of(file: Path, moving: bool) -> tuple[int, int]:
    """(width, height) in px of a picture, or of a video, as it is shown. Its head is read, of a video the first frame.

    Raises:
        InputError: the file cannot be read.
    """
    return videos.shape(file, 1)[:2] if moving else images.size_of(file)


def suffix(moving: bool) -> str:
    """Of the files that `write` writes: of pictures, or of videos."""
    return videos.LOSSLESS if moving else ".png"


def write(pixels: Tensor, file: Path, fps: float) -> None:
    """Write a picture, (3, H, W) in [-1, 1], or a video, (3, F, H, W), without loss: the whole file or nothing.

    fps: frames a second of a video.
    """
    if pixels.ndim == 3:
        images.write(pixels, file)
    else:
        videos.write(pixels, file, fps)


def is_whole(file: Path) -> bool:
    """Whether a file still holds what `write` wrote."""
    return (videos if file.suffix == videos.LOSSLESS else images).is_whole(file)


def require(file: Path, moving: bool, fps: float = 0) -> None:
    """InputError for a file that is no picture, or no video. Its head is read, of a video the first frame too.

    fps: as in `read`.
    """
    if moving:
        videos.shape(file, 1, fps)
    else:
        with decoding.opened(file):
            pass


def hashes(files: Sequence[Path]) -> list[str]:
    """Hex SHA-256 of the bytes of every file; of a folder, that of the hashes of its files by their names."""
    inner = {file: sorted(one for one in file.iterdir() if one.is_file()) for file in files if file.is_dir()}
    found = iter(core_files.hashes(one for file in files for one in inner.get(file, [file])))
    joined = ("".join(islice(found, len(inner[file]))) if file in inner else next(found) for file in files)
    return [
        hashlib.sha256(text.encode()).hexdigest() if file in inner else text
        for file, text in zip(files, joined, strict=True)
    ]
