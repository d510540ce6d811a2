"""What `tiny_models.TINY` says of a family's tiny source, and how stock pipelines guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def cfg(conditional: torch.Tensor, null: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance."""
    return null + scale * (conditional - null)


def rescaled_cfg(conditional: torch.Tensor, null: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance scaled back to the norm of the conditional prediction along the last axis."""
    guided = cfg(conditional, null, scale)
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def extra_cfg(conditional: torch.Tensor, null: torch.Tensor, scale: float) -> torch.Tensor:
    """Guidance on top of the conditional prediction: one less than the usual scale."""
    return conditional + scale * (conditional - null)


@dataclass(frozen=True)
class Tiny:
    """A family's tiny source.

    Attributes:
        build: writes the pipeline folder.
        wide: what the transformer's config says instead when its block linears are to be multiples of 128, which 4-bit
            formats need;
            None: the family is not quantised.
        prompt: what is drawn.
        length: text tokens that both sides pad to.
        side: px of the square picture.
        frames: of the video, of a family of videos.
        factor: px per latent cell of the source's autoencoder.
        deep_side: px of the bundle's square picture where the pipeline draws one area; None: two latent cells, and
            others.
        guide: how the stock pipeline puts conditional and null prediction together.
        guided: whether it does so at all.
        middle: unshifted sigma of the second of two steps; None with a DDPM schedule or none at all.
        data_sigma: what TrigFlow (arXiv 2410.11081) takes for the deviation of a latent, and its states are scaled
            with; None: no TrigFlow.
        references: (height, width) px of each picture that an editing model is given, of other sizes than it draws.
        unadapted: linears of the blocks that get no LoRA, but are quantised.
        packed_noise: whether it draws its noise on the grid of tokens.
    """

    build: Callable[[Path], None]
    wide: dict[str, Any] | None
    prompt: str = "a red fox"
    length: int = 16
    side: int = 128
    frames: int = 1
    factor: int = 8
    deep_side: int | None = None
    guide: Callable = cfg
    middle: float | None = 0.5
    data_sigma: float | None = None
    packed_noise: bool = False
    references: tuple[tuple[int, int], ...] = ()
    unadapted: str = r"(?!)"
    guided: bool = True


def lowest(shift: float) -> float:
    """Where a scheduler of static shift puts the last of its steps before it shifts them: the lowest of 1000 shifted
    levels.
    """
    return shift / (1000 + shift - 1)
