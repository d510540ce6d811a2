"""Instructions for edits of the tiny world, and the pictures that they speak of, drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dcgen_convert.core import pulse
from dcgen_convert.data import contents, images
from dcgen_convert.tiny import edits, world

WORD = "tiny-edits"
BLOCK = 1024  # edits that are sampled at once


def sampled(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """The scenes that are edited, attribute indices (count, 6), and the instructions; more begin with the same ones."""
    before, _, instructions = pairs(count, seed)
    return before, instructions


def pairs(count: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """As `sampled`, with the scenes that the edits lead to between the two."""
    blocks = [edits.sample(BLOCK, world.block_seed(seed, block)) for block in range(-(-count // BLOCK))]
    nothing = torch.empty(0, len(edits.COLUMNS), dtype=torch.int64)
    before, after = (
        torch.cat([nothing, *(getattr(block, name) for block in blocks)])[:count] for name in ("before", "after")
    )
    return before, after, [text for block in blocks for text in block.instructions][:count]


def draw(folder: Path, count: int, seed: int, side: int) -> list[Path]:
    """Files of the pictures that the first ``count`` instructions speak of; those that are there are kept."""
    return draw_scenes(folder, sampled(count, seed)[0], seed, side)


def draw_scenes(folder: Path, scenes: Tensor, seed: int, side: int) -> list[Path]:
    """Files of the pictures of scenes, attribute indices (count, 6); those that are there are kept.

    Args:
        seed: of the jitter of the first: pictures of one number have one jitter, whatever they show.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:07d}.png" for number in range(len(scenes))]
    draw_missing(
        files, lambda number, file: images.write(world.draw(scenes[number, None], seed + number, side)[0], file)
    )
    return files


def draw_missing(files: Sequence[Path], write: Callable[[int, Path], None]) -> None:
    """Have the files written that are not there or not whole, pictures or videos: ``write`` takes number and file."""
    with _one_thread():
        for number, file in enumerate(files):
            if not (file.exists() and contents.is_whole(file)):
                write(number, file)
                pulse.bump()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread. A picture takes 2 ms: where other work runs beside, the threads would wait
    for one another twenty times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
