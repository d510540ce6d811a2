"""What the file of a row shows: a picture, or a video where a number of frames is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dcgen_convert.data import images, videos

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, ...]  # (height, width) of a picture, (frames, height, width) of a video


def read(file: Path, sizes: Sequence[Size]) -> list[Tensor]:
    """Pixels of a file, read once, at several sizes, all of pictures or all of videos: (3, *size) in [-1, 1] each.

    Raises:
        InputError: the file cannot be read, or is a video of fewer frames.
    """
    planes = [(size[-2], size[-1]) for size in sizes]
    if len(sizes[0]) == 2:
        return images.read_sizes(file, planes)
    every = videos.read_sizes(file, max(size[0] for size in sizes), planes)
    return [seen[:, : size[0]] for seen, size in zip(every, sizes, strict=True)]
