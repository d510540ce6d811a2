"""Pictures of the tiny world as the user's pictures: `--data tiny-world:256` draws them at 256 px, with captions.

The embedded base models draw 128 px. A conversion to larger pictures needs pictures from elsewhere, as it does for real
models: these.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dcgen_convert.core import pulse
from dcgen_convert.core.errors import InputError
from dcgen_convert.data import images, prompts
from dcgen_convert.data.images import Picture
from dcgen_convert.tiny import world

WORD = "tiny-world"
SIDES = (32, 2048)  # px
CAPTIONS_SEED = 15_485_863  # captions and jitter that neither prompts nor metrics use
DRAWING_SEED = 32_452_843


def side_of(text: str) -> int | None:
    """Side in px of the pictures that a source `tiny-world:SIDE` names; None for every other source.

    Raises:
        InputError: the size is too small or too large.
    """
    found = re.fullmatch(rf"{WORD}:(\d+)", text)
    if not found:
        return None
    least, most = SIDES
    if not least <= int(found[1]) <= most:
        raise InputError(f"{text}: the tiny world is drawn at {least} to {most} px", f"for example {WORD}:256")
    return int(found[1])


def draw(folder: Path, count: int, side: int) -> list[Picture]:
    """The first ``count`` pictures at ``side`` px in ``folder``; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, caption in enumerate(prompts.generated(WORD, count, CAPTIONS_SEED)):
        picture = Picture(folder / f"{number:07d}.png", caption)
        if not (picture.file.exists() and images.is_whole(picture.file)):
            pixels = world.draw(torch.tensor([world.parse(caption)]), DRAWING_SEED + number, side)[0]
            images.write(pixels, picture.file)
            pulse.bump()
        pictures.append(picture)
    return pictures
