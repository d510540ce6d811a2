"""Measures of edits of any pictures: is what was asked for done, and what was not asked for left alone?"""

from __future__ import annotations

import torch
from torch import Tensor

from dcgen_convert.evaluation.clip import Tower
from dcgen_convert.evaluation.dino import FrechetDino
from dcgen_convert.evaluation.measure import EditScore

NEUTRAL = "a picture"
NOTHING = ("do nothing", "change nothing", "no change", "keep the picture as it is", "leave the picture as it is")
FINEST = (2 / 255) ** 2 / 12  # mean square of what 8 bits round off, of values in [-1, 1]: 58.9 dB


class ClipDirection(EditScore):
    """Cosine of two changes in CLIP's space: of the picture, and from a text that says nothing to the instruction.

    The published measure (arXiv 2108.00946 eq. 3, 2211.09800) takes the captions of both pictures in place of the two
    texts. A picture that did not change has 0.
    """

    name = "clip-direction"
    label = "Change of the picture along the instruction (CLIP)"

    def __init__(self, tower: Tower) -> None:
        self._tower = tower

    def made_of(self) -> str:
        return self._tower.fingerprint

    def scores_of_edits(self, pictures: Tensor, sources: Tensor, captions: list[str]) -> Tensor:
        shown = self._tower.of_pictures(pictures).double() - self._tower.of_pictures(sources).double()
        *asked, neutral = self._tower.of_texts([*captions, NEUTRAL]).double()
        return torch.cosine_similarity(shown, torch.stack(asked) - neutral)  # 0 where a change is 0


class DinoSource(EditScore):
    """Cosine of the class tokens of DINOv2 of an edited picture and of what was edited."""

    name = "dino-source"
    label = "Likeness to the picture that was edited (DINOv2)"

    def __init__(self, dino: FrechetDino) -> None:
        self._dino = dino

    def made_of(self) -> str:
        return self._dino.made_of()

    def scores_of_edits(self, pictures: Tensor, sources: Tensor, captions: list[str]) -> Tensor:  # noqa: ARG002
        shown, before = (self._dino.features(part).double() for part in (pictures, sources))
        return torch.cosine_similarity(shown, before)


class Unchanged(EditScore):
    """PSNR in dB to the picture that was edited, where the instruction is one of NOTHING; 58.9 dB at most."""

    name = "unchanged"
    label = "PSNR to the source where nothing was asked for"
    unit = "dB"

    def scores_of_edits(self, pictures: Tensor, sources: Tensor, captions: list[str]) -> Tensor:
        error = (pictures.double() - sources.double()).square().mean((1, 2, 3)).cpu()
        quiet = torch.tensor([asks_nothing(caption) for caption in captions])
        return torch.where(quiet, 10 * torch.log10(4 / error.clamp_min(FINEST)), torch.nan)


def asks_nothing(instruction: str) -> bool:
    """Whether an instruction is one of NOTHING."""
    return instruction.lower().strip(" .!") in NOTHING
