"""The second judge of the tiny world: it reads how the shape of a video moves. The first one reads a frame of it.

It was trained with drawn videos only.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgen_convert.tiny import videos

SEEN = 64  # px of the frames that it looks at


def middle(clips: Tensor) -> Tensor:
    """The frame that shows place and size best: of videos (B, 3, F, H, W) the pictures (B, 3, H, W).

    Frames that are no multiple of 4 are the beginning of a video that is longer by up to 3, as 13 are of 16.
    """
    frames = clips.shape[2]
    return clips[:, :, min(frames + -frames % 4, 2 * frames - 2) // 2]


class MotionEvaluator(nn.Module):
    """Convolutions with stride 2 over how the middle frame and the last one differ from the first, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((6, 16, 24, 32, 32)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # (B, 6, 64, 64) -> (B, 32, 4, 4)
        self.head = nn.Linear(32 * 16, len(videos.MOTIONS))

    def forward(self, clips: Tensor) -> Tensor:
        """Videos (B, 3, F, H, W) in [-1, 1], F >= 2 -> logits of the motions, (B, 6)."""
        first, half, last = (clips[:, :, number] for number in (0, clips.shape[2] // 2, -1))
        seen = torch.cat([half - first, last - first], dim=1)
        return self.head(self.trunk(F.interpolate(seen, size=(SEEN, SEEN), mode="area")).flatten(1))
