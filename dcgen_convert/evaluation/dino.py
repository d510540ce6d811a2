"""The Frechet distance of DINOv2's features, which agrees with people better than that of Inception's."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgen_convert.evaluation import preparation, weights
from dcgen_convert.evaluation.measure import Distance
from dcgen_convert.evaluation.metrics import frechet

DINO = weights.Needed("a DINOv2 model", "dinov2", "--dino", "facebook/dinov2-large")
AT_ONCE = 32  # pictures


class FrechetDino(Distance):
    """Frechet distance of the class tokens of DINOv2 (FD-DINOv2, arXiv 2306.04675)."""

    name = "fd-dinov2"
    label = "Frechet distance of DINOv2 features"

    def __init__(self, folder: Path, device: str) -> None:
        self._folder, self._device = folder, device
        self._prepared = preparation.read(folder, preparation.DINO)

    @cached_property
    def _model(self) -> Any:
        from transformers import Dinov2Model

        return weights.load(Dinov2Model, self._folder, self._device)

    def made_of(self) -> str:
        return weights.fingerprint_of(self._folder)

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        parts = (self._prepared(part).to(self._device) for part in pictures.split(AT_ONCE))
        return torch.cat([self._model(part).last_hidden_state[:, 0].float().cpu() for part in parts])

    def distance(self, a: Tensor, b: Tensor) -> float:
        return frechet(a, b)


def dino(given: str | None, device: str, *, fetch: bool, asked: bool, recipe: bool = False) -> FrechetDino:
    """The measure with the model that was given, or the usual one; errors as `weights.find`."""
    return FrechetDino(weights.find(given, DINO, fetch=fetch, asked=asked, recipe=recipe), device)
