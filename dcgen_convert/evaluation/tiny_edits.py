"""Edits of the tiny world, judged by its own evaluator.

*Edit accuracy*: the attribute that the instruction names reads as it was asked for. *Preservation*: the other five
attributes (of shape, colour, scene, place, size and texture) read as in the picture that was edited.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation import tiny_world
from dcgen_convert.evaluation.measure import EditScore, Score
from dcgen_convert.evaluation.tiny_measures import ByEvaluator
from dcgen_convert.tiny import edits


class EditAccuracy(ByEvaluator, Score):
    """1 where the picture shows what the instruction asks for, else 0."""

    name = "edit-accuracy"
    label = "Edits that show what was asked for"

    def scores(self, pictures: Tensor, captions: list[str]) -> Tensor:
        return changed(pictures, captions)


class Preservation(ByEvaluator, EditScore):
    """Share of the other attributes that the edit left as they were, 0..1."""

    name = "preservation"
    label = "Attributes of the source that the edits keep"

    def scores_of_edits(self, pictures: Tensor, sources: Tensor, captions: list[str]) -> Tensor:
        return kept(pictures, sources, captions).nanmean(1)


def asked(instruction: str) -> tuple[int, int]:
    """Column of the attribute that an instruction changes, and its new value.

    Raises:
        InputError: it is no instruction of the tiny world.
    """
    found = edits.parse(instruction)
    if found is None:
        raise InputError(
            f"the tiny world has no instruction {instruction[:80]!r}",
            "its instructions are like 'make the circle blue'; for others leave this measure out (in a conversion: "
            "evaluate.metrics=none)",
        )
    return found


def changed(pictures: Tensor, instructions: list[str]) -> Tensor:
    """1 where the asked-for attribute reads right, else 0: (B,) float64, of pictures (B, 3, H, W) in [-1, 1]."""
    columns, values = torch.tensor([asked(text) for text in instructions]).T
    return (tiny_world.read(pictures)[torch.arange(len(pictures)), columns] == values).double()


def kept(pictures: Tensor, sources: Tensor, instructions: list[str]) -> Tensor:
    """1 where an attribute reads as in the source, 0 where it does not, NaN where it was to change: (B, 6) float64.

    Args:
        pictures: edited pictures, (B, 3, H, W) in [-1, 1].
        sources: the pictures that they were made from, in the same form; their size may be another.
    """
    same = (tiny_world.read(pictures) == tiny_world.read(sources)).double()
    same[torch.arange(len(pictures)), [asked(text)[0] for text in instructions]] = torch.nan
    return same
