"""Instructions for edits of the tiny world, and the pictures that they speak of, drawn."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dcgen_convert.core import pulse
from dcgen_convert.data import images
from dcgen_convert.tiny import edits, world

WORD = "tiny-edits"
BLOCK = 1024  # edits that are sampled at once


def sampled(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """The scenes that are edited, attribute indices (count, 6), and the instructions; more begin with the same ones."""
    blocks = [edits.sample(BLOCK, seed + (block << 32)) for block in range(-(-count // BLOCK))]
    scenes = torch.cat([block.before for block in blocks]) if blocks else torch.empty(0, len(edits.COLUMNS))
    return scenes[:count], [text for block in blocks for text in block.instructions][:count]


def draw(folder: Path, count: int, seed: int, side: int) -> list[Path]:
    """Files of the pictures that the first ``count`` instructions speak of; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, scene in enumerate(sampled(count, seed)[0]):
        file = folder / f"{number:07d}.png"
        if not (file.exists() and images.is_whole(file)):
            images.write(world.draw(scene[None], seed + number, side)[0], file)
            pulse.bump()
        files.append(file)
    return files
