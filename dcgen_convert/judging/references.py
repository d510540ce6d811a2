"""Pictures that were given to compare with: a folder of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import gathering, images
from dcgen_convert.judging.gallery import together


@dataclass(frozen=True)
class References:
    """name: as the user gave it. files: the pictures. prompts: those that belong to them, where they are used."""

    name: str
    files: list[Path]
    prompts: list[str] | None = None

    def batches(self, side: int) -> Iterator[tuple[Tensor, list[str]]]:
        """The pictures, cut to the middle square and resized to ``side`` px: (B, 3, side, side) in [-1, 1]."""
        for start in range(0, len(self.files), together(side)):
            part = self.files[start : start + together(side)]
            yield torch.stack([images.read_pixels(file, side) for file in part]), []


def of_request(folder: str | None) -> References | None:
    """The reference pictures that the user asked for."""
    if folder is None:
        return None
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise InputError(f"the reference {path} is not a folder", "give a folder of pictures with --reference")
    files, _ = gathering.gather(path)
    if len(files) < 2:
        raise InputError(
            f"the reference {path} holds {len(files)} pictures, at least 2 are needed", "give more pictures"
        )
    return References(folder, sorted(files))
