"""The tiny world in motion: videos with captions, of the world's six attributes and of how the shape moves.

A caption says the motion last, in words that no other attribute uses:

    a small striped red circle at the top left on grass, moving rightwards

There are 32,400 captions. Place and size are those of the middle of the video: there it shows what the picture of the
same attributes and the same seed shows. Jitter is one for all frames, so that nothing but the shape moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcgen_convert.tiny import world

FRAMES = 16
FPS = 8  # frames a second that tiny-wan draws
TRAVEL = 36.0  # px of the 128 px picture, from the first frame to the last
GROWTH = 0.6  # of the radius, from the first frame to the last
MOTIONS = {  # phrase -> (x, y) in TRAVEL, radius in GROWTH
    "moving leftwards": (-1.0, 0.0, 0.0),
    "moving rightwards": (1.0, 0.0, 0.0),
    "moving upwards": (0.0, -1.0, 0.0),
    "moving downwards": (0.0, 1.0, 0.0),
    "standing still": (0.0, 0.0, 0.0),
    "growing": (0.0, 0.0, 1.0),
}
ATTRIBUTES = {**world.ATTRIBUTES, "motion": tuple(MOTIONS)}
OTHER = 700_000_001  # added to the seed: equal numbers would tie the motion to another attribute


def caption(labels: Sequence[int]) -> str:
    """The caption of one row of attribute indices, in the order of ``ATTRIBUTES``."""
    return f"{world.caption(labels[:-1])}, {ATTRIBUTES['motion'][int(labels[-1])]}"


def parse(text: str) -> list[int] | None:
    """Attribute indices of a caption that `caption` wrote; None where it says something else."""
    picture, _, motion = text.rpartition(", ")
    labels = world.parse(picture)
    return None if labels is None or motion not in MOTIONS else [*labels, ATTRIBUTES["motion"].index(motion)]


def picture_of(text: str) -> str:
    """What a caption that `caption` wrote says of the middle frame: a caption of the tiny world without motion."""
    return text.rpartition(", ")[0]


def sample_labels(count: int, seed: int) -> Tensor:
    """``count`` rows of uniformly drawn attribute indices, (count, 7) int64."""
    generator = torch.Generator().manual_seed(seed + OTHER)
    motion = torch.randint(len(MOTIONS), (count, 1), generator=generator)
    return torch.cat([world.sample_labels(count, seed), motion], dim=1)


def draw(labels: Tensor, seed: int, frames: int = FRAMES, side: int = world.SIDE) -> Tensor:
    """Draw one video per row of ``labels``.

    Args:
        labels: (B, 7) attribute indices.
        seed: seed of all jitter; the same (labels, seed) gives the same pixels.
        side: height and width in px.

    Returns:
        (B, 3, frames, side, side) float32 in [-1, 1].
    """
    return torch.stack([frame(labels, seed, moment, side) for moment in moments(frames)], dim=2)


def frame(labels: Tensor, seed: int, moment: float, side: int = world.SIDE) -> Tensor:
    """One frame of each video that `draw` makes of the same arguments, (B, 3, side, side).

    Args:
        moment: when it is, from -0.5 to 0.5.
    """
    x, y, radius = torch.tensor(list(MOTIONS.values()))[labels[:, -1]].unbind(1)
    shift = torch.stack([x, y], dim=1) * TRAVEL * moment
    return world.draw(labels[:, :-1], seed, side, shift=shift, growth=1 + radius * GROWTH * moment)


def moments(frames: int = FRAMES) -> list[float]:
    """When each frame is, from -0.5 to 0.5; a single one is the middle."""
    return [number / (frames - 1) - 0.5 for number in range(frames)] if frames > 1 else [0.0]
