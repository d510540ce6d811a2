"""Pictures of the tiny world as the user's pictures: `--data tiny-world:256` draws them at 256 px, with captions.
`--data tiny-edits:128` draws edits at 128 px, each with its instruction and the picture that is edited, and
`--data tiny-videos:128` videos with captions, of as many frames as the recipe asks for.

The embedded base models draw 128 px. A conversion to larger pictures needs pictures from elsewhere, as it does for real
models: these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import drawn_edits, images, prompts, videos
from dcgen_convert.data.images import Picture
from dcgen_convert.tiny import videos as tiny_videos
from dcgen_convert.tiny import world

WORD, VIDEOS = "tiny-world", "tiny-videos"
SHOWN = {WORD: "pictures", drawn_edits.WORD: "edits", VIDEOS: "videos"}
SIDES = (32, 2048)  # px
CAPTIONS_SEED = 15_485_863  # captions and jitter that neither prompts nor metrics use
DRAWING_SEED = 32_452_843


def side_of(text: str) -> int | None:
    """Side in px of the pictures that a source WORD:SIDE names, of one of the words in SHOWN; None for all else.

    Raises:
        InputError: the size is too small or too large.
    """
    found = re.fullmatch(rf"(?:{'|'.join(SHOWN)}):(\d+)", text)
    if not found:
        return None
    least, most = SIDES
    if not least <= int(found[1]) <= most:
        raise InputError(f"{text}: the tiny world is drawn at {least} to {most} px", f"for example {WORD}:256")
    return int(found[1])


def holds_edits(text: str) -> bool:
    """Whether a source names drawn edits."""
    return text.startswith(f"{drawn_edits.WORD}:") and side_of(text) is not None


def folder_name(text: str, frames: int = 0, fps: float = 0) -> str:
    """Name of the folder for what a source names: another size, or other frames, have another one."""
    word, _, side = text.partition(":")
    return {WORD: f"scenes-{side}", drawn_edits.WORD: f"edits-{side}", VIDEOS: f"videos-{side}-{frames}-{fps:g}"}[word]


def draw(folder: Path, text: str, count: int, edited: bool = False, frames: int = 0, fps: float = 0) -> list[Picture]:
    """The first ``count`` pictures of the source ``text`` in ``folder``; those that are there are kept.

    Args:
        edited: whether they are for a model that edits. frames: of a video; 0: for a model that draws pictures. fps: of
            these, a second.
    Raises:
        InputError: edits for a model that draws from text alone, videos for one that draws pictures, or pictures for
            one that draws videos.
        ResourceError: videos, and PyAV is not installed.
    """
    side = side_of(text)
    assert side is not None, text
    word = text.partition(":")[0]
    if (word == VIDEOS) != (frames > 0):
        draws, use = ("videos", VIDEOS) if frames else ("pictures", WORD)
        raise InputError(f"{text} gives {SHOWN[word]}, and the model draws {draws}", f"use {use}:{side}")
    if word == VIDEOS:
        return _videos(folder, count, side, frames, fps)
    if word == WORD:
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


def first_frames(folder: Path, captions: Sequence[str], seed: int, side: int) -> list[Path]:
    """Files of the first frames of the videos that ``captions`` describe; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:07d}.png" for number in range(len(captions))]

    def write(number: int, file: Path) -> None:
        labels = torch.tensor([tiny_videos.parse(captions[number])])
        images.write(tiny_videos.frame(labels, seed + number, tiny_videos.moments()[0], side)[0], file)

    drawn_edits.draw_missing(files, write)
    return files


def _videos(folder: Path, count: int, side: int, frames: int, fps: float) -> list[Picture]:
    folder.mkdir(parents=True, exist_ok=True)
    captions = prompts.generated(VIDEOS, count, CAPTIONS_SEED)
    files = [folder / f"{number:07d}{videos.LOSSLESS}" for number in range(count)]

    def write(number: int, file: Path) -> None:
        labels = torch.tensor([tiny_videos.parse(captions[number])])
        videos.write(tiny_videos.draw(labels, DRAWING_SEED + number, frames, side)[0], file, fps)

    drawn_edits.draw_missing(files, write)
    return [Picture(file, caption) for file, caption in zip(files, captions, strict=True)]
