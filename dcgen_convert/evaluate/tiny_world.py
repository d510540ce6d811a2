"""Attribute accuracy and Frechet distance on the tiny world, by its own evaluator.

Attribute accuracy: fraction of caption attributes (shape, colour, scene, place, size, texture) that the evaluator reads
off the picture. Class-conditional pictures are asked for shape and colour only.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluate.metrics import frechet
from dcgen_convert.tiny import world
from dcgen_convert.tiny.evaluator import Evaluator

WEIGHTS = Path(world.__file__).parent / "weights" / "evaluator.safetensors"


@cache
def judge() -> Evaluator:
    model = Evaluator()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def accuracy(pictures: Tensor, captions: list[str]) -> float:
    """Fraction of right attributes, 0..1; pictures (B, 3, H, W) in [-1, 1]."""
    wanted = [asked(caption) for caption in captions]
    shown = judge().read(pictures)
    right = [float(shown[i, column] == value) for i, labels in enumerate(wanted) for column, value in labels.items()]
    return sum(right) / len(right)


def asked(caption: str) -> dict[int, int]:
    """Attribute column -> value that a caption (all six) or a class name ("red circle") asks for."""
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
    """(B, FEATURES) for a Frechet distance."""
    return torch.cat([judge().embed(part) for part in pictures.split(100)])


def distance(pictures: Tensor, captions: list[str], seed: int = 31) -> float:
    """Frechet distance to freshly drawn pictures, as many as are given (at least 256).

    Pictures of classes are measured against pictures of classes.
    """
    labels = world.sample_labels(max(256, len(pictures)), seed, by_class=world.parse(captions[0]) is None)
    real = torch.cat([world.draw(rows, seed + i) for i, rows in enumerate(labels.split(100))])
    return frechet(features(pictures), features(real))
