"""Measures of videos. What a measure of pictures says of a video, it says of some of its frames: see `frames_of`."""

from __future__ import annotations

import torch
from torch import Tensor

from dcgen_convert.core.files import sha256
from dcgen_convert.evaluation import tiny_videos, tiny_world
from dcgen_convert.evaluation.edit_measures import FINEST
from dcgen_convert.evaluation.grids import places_of
from dcgen_convert.evaluation.measure import EditScore, Score
from dcgen_convert.evaluation.pixels import to_uint8


def frames_of(clips: Tensor) -> Tensor:
    """(B, 3, F, H, W) -> (B, K, 3, H, W): the frames that a sheet shows too."""
    return clips[:, :, places_of(clips.shape[2])].movedim(2, 1)


class TemporalDifference(Score):
    """Mean absolute difference of neighbouring frames, in levels of 8 bits. A video that stands still has 0.

    More is no quality by itself, as flicker raises it and blur lowers it: compare it with the base model's.
    """

    name = "temporal-difference"
    label = "Difference of neighbouring frames"
    unit = "levels"
    reads = False
    moving = True

    def scores(self, pictures: Tensor, captions: list[str]) -> Tensor:  # noqa: ARG002  it needs no caption
        """pictures: (B, 3, F, H, W) in [-1, 1], F >= 2."""
        return torch.stack([to_uint8(clip).double().diff(dim=1).abs().mean() for clip in pictures])


class FirstFrame(EditScore):
    """PSNR in dB of the first frame to the picture that the video was drawn from; 58.9 dB at most."""

    name = "first-frame"
    label = "PSNR of the first frame to the picture that was given"
    unit = "dB"
    moving = True

    def scores_of_edits(self, pictures: Tensor, sources: Tensor, captions: list[str]) -> Tensor:  # noqa: ARG002
        """pictures: (B, 3, F, H, W) in [-1, 1]; sources: (B, 3, H, W)."""
        error = (pictures[:, :, 0].double() - sources.double()).square().mean((1, 2, 3)).cpu()
        return 10 * torch.log10(4 / error.clamp_min(FINEST))


class MotionAccuracy(Score):
    """Share of the caption's seven attributes that the video shows, 0..1; the motion is one of them."""

    name = "motion-accuracy"
    label = "Asked-for attributes that the videos show, motion included"
    moving = True

    def made_of(self) -> str:
        return sha256(tiny_world.WEIGHTS) + sha256(tiny_videos.WEIGHTS)

    def scores(self, pictures: Tensor, captions: list[str]) -> Tensor:
        """pictures: (B, 3, F, H, W) in [-1, 1], F >= 2."""
        return tiny_videos.right(pictures, captions)
