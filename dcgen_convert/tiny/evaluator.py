"""The judge of the tiny world: it reads the six attributes from a picture, and gives features for a Frechet distance.

It was trained with drawn pictures only. It has no part in the training of the models that it judges.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgen_convert.tiny import world

FEATURES = 96


def seen(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in the size that the evaluator looks at, (B, 3, 128, 128)."""
    if pictures.shape[-2:] == (world.SIDE, world.SIDE):
        return pictures
    return F.interpolate(pictures, size=(world.SIDE, world.SIDE), mode="area")


class Evaluator(nn.Module):
    """Convolutions with stride 2 down to a 4 x 4 grid, features from it, and one linear head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64, 64)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)  # (B, 3, 128, 128) -> (B, 64, 4, 4)
        self.features = nn.Linear(64 * 16, FEATURES)
        self.heads = nn.ModuleList(nn.Linear(FEATURES, len(names)) for names in world.ATTRIBUTES.values())

    def embed(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, FEATURES)."""
        return self.features(self.trunk(seen(pictures)).flatten(1))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Logits per attribute, each (B, number of values)."""
        features = F.silu(self.embed(pictures))
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """Attribute indices of the pictures, (B, 6)."""
        return torch.stack([logits.argmax(1) for logits in self(pictures)], dim=1)
