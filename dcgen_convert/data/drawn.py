"""Pictures of the tiny world as the user's pictures: `--data tiny-world:256` draws them at 256 px, with captions, and
`--data tiny-edits:128` draws edits at 128 px, each with its instruction and the picture that is edited.

The embedded base models draw 128 px. A conversion to larger pictures needs pictures from elsewhere, as it does for real
models: these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from dcgen_convert.core import pulse
from dcgen_convert.core.errors import InputError
from dcgen_convert.data import drawn_edits, images, prompts
from dcgen_convert.data.images import Picture
from dcgen_convert.tiny import world

WORD = "tiny-world"
SIDES = (32, 2048)  # px
CAPTIONS_SEED = 15_485_863  # captions and jitter that neither prompts nor metrics use
DRAWING_SEED = 32_452_843


def side_of(text: str) -> int | None:
    """Side in px of the pictures that a source `tiny-world:SIDE` or `tiny-edits:SIDE` names; None for all else.

    Raises:
        InputError: the size is too small or too large.
    """
    found = re.fullmatch(rf"(?:{WORD}|{drawn_edits.WORD}):(\d+)", text)
    if not found:
        return None
    least, most = SIDES
    if not least <= int(found[1]) <= most:
        raise InputError(f"{text}: the tiny world is drawn at {least} to {most} px", f"for example {WORD}:256")
    return int(found[1])


def holds_edits(text: str) -> bool:
    """Whether a source names drawn edits."""
    return text.startswith(f"{drawn_edits.WORD}:") and side_of(text) is not None


def draw(folder: Path, text: str, count: int, edited: bool = False) -> list[Picture]:
    """The first ``count`` pictures of the source ``text`` in ``folder``; those that are there are kept.

    Args:
        edited: whether they are for a model that edits.
    Raises:
        InputError: edits for a model that draws from text alone.
    """
    side = side_of(text)
    assert side is not None, text
    if not holds_edits(text):
        captions = prompts.generated(WORD, count, CAPTIONS_SEED)
        scenes = (torch.tensor([world.parse(caption)]) for caption in captions)
        return [Picture(file, caption) for caption, file in zip(captions, _files(folder, scenes, side), strict=True)]
    if not edited:
        raise InputError(f"{text} gives edits, and the model draws from text alone", f"use {WORD}:{side}")
    before, after, instructions = drawn_edits.pairs(count, CAPTIONS_SEED)
    given, wanted = (_files(folder / name, labels.split(1), side) for name, labels in (("given", before), ("", after)))
    return [
        Picture(picture, instruction, references=(source,))
        for picture, source, instruction in zip(wanted, given, instructions, strict=True)
    ]


def _files(folder: Path, scenes: Iterable[Tensor], side: int) -> list[Path]:
    """The pictures of scenes, each (1, 6) attribute indices. Pictures of one number have one jitter."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, scene in enumerate(scenes):
        file = folder / f"{number:07d}.png"
        if not (file.exists() and images.is_whole(file)):
            images.write(world.draw(scene, DRAWING_SEED + number, side)[0], file)
            pulse.bump()
        files.append(file)
    return files
