"""Measures of the tiny world, with its own evaluator. They need the tiny world's captions."""

from __future__ import annotations

import torch
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import sha256
from dcgen_convert.evaluation import tiny_world
from dcgen_convert.evaluation.kernel import cmmd
from dcgen_convert.evaluation.measure import Distance, Measure, Score
from dcgen_convert.evaluation.metrics import frechet
from dcgen_convert.tiny import world
from dcgen_convert.tiny.evaluator import FEATURES

SIDE_OF_CROPS = 2 * world.SIDE  # px: the smallest picture that has parts


class ByEvaluator(Measure):
    """A measure that the shipped evaluator makes."""

    def made_of(self) -> str:
        return sha256(tiny_world.WEIGHTS)


class Accuracy(ByEvaluator, Score):
    """Share of the caption's attributes that the picture shows, 0..1."""

    name = "accuracy"
    label = "Asked-for attributes that the pictures show"

    def scores(self, pictures: Tensor, captions: list[str]) -> Tensor:
        return tiny_world.right(pictures, captions)


class TinyFrechet(ByEvaluator, Distance):
    """Frechet distance of the evaluator's features."""

    name = "frechet"
    label = "Frechet distance (tiny world)"

    def features(self, pictures: Tensor) -> Tensor:
        return tiny_world.features(pictures)

    def distance(self, a: Tensor, b: Tensor) -> float:
        return frechet(a, b)


class CropsFrechet(ByEvaluator, Distance):
    """The same of the four parts of 128 px that meet in a picture's centre: their features stand in one row."""

    name = "crops-frechet"
    label = "Frechet distance of parts of 128 px (tiny world)"

    def features(self, pictures: Tensor) -> Tensor:
        if min(pictures.shape[-2:]) < SIDE_OF_CROPS:
            raise InputError(
                f"{self.name} needs pictures of at least {SIDE_OF_CROPS} px, these have {min(pictures.shape[-2:])}",
                "leave it out, or draw larger pictures",
            )
        parts = tiny_world.features(tiny_world.crops(pictures))  # (4 B, D), the first part of every picture first
        return torch.cat(parts.chunk(4), 1)

    def distance(self, a: Tensor, b: Tensor) -> float:
        return frechet(a.reshape(-1, FEATURES), b.reshape(-1, FEATURES))


class TinyCmmd(ByEvaluator, Distance):
    """CMMD with the evaluator's features in place of CLIP's."""

    name = "tiny-cmmd"
    label = "CMMD (tiny world)"

    def features(self, pictures: Tensor) -> Tensor:
        return tiny_world.features(pictures)

    def distance(self, a: Tensor, b: Tensor) -> float:
        return cmmd(a, b)
