"""Attribute accuracy of videos of the tiny world: its own evaluators read the middle frame, and the motion."""

from __future__ import annotations

from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation import tiny_world
from dcgen_convert.tiny import videos
from dcgen_convert.tiny.motion import MotionEvaluator, middle

WEIGHTS = tiny_world.WEIGHTS.with_name("motion.safetensors")


@cache
def judge() -> MotionEvaluator:
    """The shipped evaluator of motion."""
    model = MotionEvaluator()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def accuracy(clips: Tensor, captions: list[str]) -> float:
    """Fraction of attributes that are right, 0..1, of videos (B, 3, F, H, W) in [-1, 1]."""
    return right(clips, captions).mean().item()


def right(clips: Tensor, captions: list[str]) -> Tensor:
    """Fraction of the seven attributes that are right in each video (B, 3, F, H, W) in [-1, 1]: (B,) float64."""
    return found(clips, captions).double().mean(1)


def found(clips: Tensor, captions: list[str]) -> Tensor:
    """Which attributes are right, (B, 7) bool, in the order of `videos.ATTRIBUTES`: the motion is the last."""
    return read(clips) == torch.tensor([asked(caption) for caption in captions])


@torch.no_grad()
def read(clips: Tensor) -> Tensor:
    """Attribute indices that the evaluators read from videos (B, 3, F, H, W) in [-1, 1], F >= 2: (B, 7)."""
    motion = torch.cat([judge()(part).argmax(1) for part in clips.split(50)])
    return torch.cat([tiny_world.read(middle(clips)), motion[:, None]], dim=1)


def asked(caption: str) -> list[int]:
    """Attribute indices that a caption asks for.

    Raises:
        InputError: it is no caption of the tiny world in motion.
    """
    labels = videos.parse(caption)
    if labels is None:
        raise InputError(
            f"the tiny world has no video {caption[:80]!r}",
            "its captions are like 'a small striped red circle at the top left on grass, moving rightwards'; for other "
            "videos leave this measure out",
        )
    return labels
