"""Pictures that were given to compare with: a folder of them, or MJHQ-30K."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import hashes
from dcgen_convert.data import gathering, images, mjhq

MJHQ = "mjhq:"  # before the folder of the data set
TOGETHER = 4 * 1024**2  # px that are measured together, MOST pictures at most
MOST = 64


@dataclass(frozen=True)
class References:
    """Given pictures.

    Attributes:
        name: as the user gave it. count: how many there are.
        stream: (places, side in px) -> the pictures there one by one, (3, side, side) in [-1, 1], as `images.fitted`.
        keys: () -> a hash of every picture's bytes.
    """

    name: str
    count: int
    stream: Callable[[Sequence[int], int], Iterator[Tensor]]
    keys: Callable[[], list[str]]

    def batches(self, side: int) -> Iterator[tuple[Tensor, list[str]]]:
        """The pictures at ``side`` px, (B, 3, side, side) in [-1, 1], without captions."""
        pictures = self.stream(range(self.count), side)
        while part := list(islice(pictures, together(side))):
            yield torch.stack(part), []


def together(height: int, width: int | None = None) -> int:
    """Pictures of this size, in px, that are measured together."""
    return max(1, min(MOST, TOGETHER // (height * (width or height))))


def read(name: str) -> References:
    """The pictures in a folder, or all of those of `mjhq:FOLDER`.

    Raises:
        InputError: there is no such folder, or it has fewer than 2 pictures.
    """
    if name.startswith(MJHQ):
        every = mjhq.read(Path(name.removeprefix(MJHQ)))
        return References(
            name,
            len(every.entries),
            lambda places, side: every.pictures([every.entries[place] for place in places], side),
            every.keys,
        )
    path = Path(name).expanduser().absolute()
    if not path.is_dir():
        raise InputError(f"the reference {path} is not a folder", "give a folder of pictures, or mjhq:FOLDER")
    files = sorted(gathering.gather(path)[0])
    if len(files) < 2:
        raise InputError(f"the reference {path} holds {len(files)} pictures, and at least 2 are needed", "give more")
    return References(
        name,
        len(files),
        lambda places, side: (images.read_pixels(files[place], side) for place in places),
        lambda: hashes(files),
    )


def mjhq_prompts(name: str, count: int) -> tuple[list[str], References | None]:
    """(the prompts of the authors' subset of `mjhq:FOLDER` in their order, its pictures if the folder has any)."""
    found = mjhq.read(Path(name.removeprefix(MJHQ)))
    texts = [entry.prompt for entry in found.subset(count)]
    return texts, read(name) if found.has_pictures else None
