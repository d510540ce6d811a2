"""Pictures of the tiny world as the user's pictures: `--data tiny-world:256` draws them at 256 px, with captions, and
`--data tiny-edits:128` draws edits at 128 px, each with its instruction and the picture that is edited.

The embedded base models draw 128 px. A conversion to larger pictures needs pictures from elsewhere, as it does for real
models: these.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import drawn_edits, prompts
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
        scenes = torch.tensor([world.parse(caption) for caption in captions])
        files = drawn_edits.draw_scenes(folder, scenes, DRAWING_SEED, side)
        return [Picture(file, caption) for caption, file in zip(captions, files, strict=True)]
    if not edited:
        raise InputError(f"{text} gives edits, and the model draws from text alone", f"use {WORD}:{side}")
    before, after, instructions = drawn_edits.pairs(count, CAPTIONS_SEED)
    wanted = drawn_edits.draw_scenes(folder, after, DRAWING_SEED, side)
    given = drawn_edits.draw_scenes(folder / "given", before, DRAWING_SEED, side)
    return [
        Picture(picture, instruction, references=(source,))
        for picture, source, instruction in zip(wanted, given, instructions, strict=True)
    ]
