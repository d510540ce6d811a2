"""Attribute accuracy and Frechet distance in the tiny world, measured by its own evaluator.

Attribute accuracy: the fraction of the caption's attributes (shape, colour, scene, place, size, texture) that the
evaluator finds in the picture. For class-conditional pictures only shape and colour count.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation.metrics import frechet
from dcgen_convert.tiny import world
from dcgen_convert.tiny.evaluator import Evaluator

FEWEST = 256  # newly drawn pictures
WEIGHTS = Path(world.__file__).parent / "weights" / "evaluator.safetensors"


@cache
def judge() -> Evaluator:
    """The shipped evaluator."""
    model = Evaluator()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def accuracy(pictures: Tensor, captions: list[str]) -> float:
    """Fraction of attributes that are right, 0..1, of pictures (B, 3, H, W) in [-1, 1]."""
    return right(pictures, captions).mean().item()


def right(pictures: Tensor, captions: list[str]) -> Tensor:
    """Fraction of attributes that are right in each picture, (B,) float64 in 0..1.

    Args:
        pictures: (B, 3, H, W) in [-1, 1].
    """
    wanted = [asked(caption) for caption in captions]
    shown = read(pictures)
    found = [
        sum(int(shown[i, column]) == value for column, value in labels.items()) / len(labels)
        for i, labels in enumerate(wanted)
    ]
    return torch.tensor(found, dtype=torch.float64)


def read(pictures: Tensor) -> Tensor:
    """Attribute indices that the evaluator reads from pictures (B, 3, H, W) in [-1, 1]: (B, 6)."""
    return torch.cat([judge().read(part) for part in pictures.split(100)])


def asked(caption: str) -> dict[int, int]:
    """Column of an attribute -> wanted value. A caption asks for all six, a class name ("red circle") for two."""
    labels = world.parse(caption)
    if labels is not None:
        return dict(enumerate(labels))
    for label, (shape, color) in enumerate(world.CLASSES):
        if caption == f"{color} {shape}":
            return {0: label // len(world.COLORS), 1: label % len(world.COLORS)}
    raise InputError(
        f"the tiny world has no caption {caption!r}", "use --prompts tiny-world, or set evaluate.metrics to none"
    )


@torch.no_grad()
def features(pictures: Tensor) -> Tensor:
    """Features of the pictures for a Frechet distance, (B, FEATURES)."""
    return torch.cat([judge().embed(part) for part in pictures.split(100)])


def centre(pictures: Tensor) -> Tensor:
    """The middle of each picture, (B, 3, 2 SIDE, 2 SIDE). Both sides must be at least twice SIDE."""
    side = 2 * world.SIDE
    top, left = ((length - side) // 2 for length in pictures.shape[-2:])
    return pictures[..., top : top + side, left : left + side]


def crops(pictures: Tensor) -> Tensor:
    """Four parts of each picture at the evaluator's own size: those that meet in its centre, (4 B, 3, SIDE, SIDE).

    The evaluator shrinks a larger picture, so that what is finer than 128 px can show escapes it. Here it sees pixels.

    Args:
        pictures: (B, 3, H, W), both sides at least twice SIDE.
    """
    return torch.cat([part for row in centre(pictures).chunk(2, -2) for part in row.chunk(2, -1)])


def distance(pictures: Tensor, captions: list[str], seed: int = 31) -> float:
    """Frechet distance to newly drawn pictures. There are as many of them as ``pictures``, but at least FEWEST.

    For pictures of classes the newly drawn pictures are of classes too.
    """
    return frechet(features(pictures), _real(_count(pictures), _by_class(captions), seed, world.SIDE))


def distance_of_crops(pictures: Tensor, captions: list[str], seed: int = 31, side: int | None = None) -> float:
    """The same between `crops` of the pictures, (B, 3, side, side), and of pictures that are drawn at their size.

    Args:
        side: px; only needed where ``pictures`` are the `centre` of each.
    """
    side = side or pictures.shape[-1]
    return frechet(features(crops(pictures)), _real(_count(pictures), _by_class(captions), seed, side, cropped=True))


def _count(pictures: Tensor) -> int:
    return max(FEWEST, len(pictures))


def _by_class(captions: list[str]) -> bool:
    return world.parse(captions[0]) is None


@cache
def _real(count: int, by_class: bool, seed: int, side: int, cropped: bool = False) -> Tensor:
    """Features of ``count`` newly drawn pictures, or of their crops. Several sets are compared with the same ones."""
    labels = world.sample_labels(count, seed, by_class=by_class)
    drawn = torch.cat([world.draw(rows, seed + i, side) for i, rows in enumerate(labels.split(100))])
    return features(crops(drawn) if cropped else drawn)
