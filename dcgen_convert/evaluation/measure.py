"""What a measure is. `measures` holds the table of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """Where the networks of the measures lie, as the user gave it: a folder, a hub id or a file. None: not given."""

    clip: str | None = None
    dino: str | None = None
    pickscore: str | None = None
    inception: str | None = None
    detector: str | None = None


class Measure:
    """One measure of pictures.

    Attributes:
        name: how users call it.
        kind: "score": a number per picture. "distance": one number for two sets of pictures.
        better: which of two values is the better one.
        label: what it says, for tables and charts.
        unit: of its numbers; "" where they have none.
        moving: whether it looks at whole videos; else at pictures, and of videos at some of their frames.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["score", "distance"]]
    better: ClassVar[Literal["higher", "lower"]]
    label: ClassVar[str]
    unit: ClassVar[str] = ""
    moving: ClassVar[bool] = False

    def made_of(self) -> str:
        """Hash of what its numbers depend on beside pictures and captions: the weights, the program; "" for nothing."""
        return ""


class Score(Measure):
    """A measure that gives every picture a number.

    Attributes:
        reads: whether the number depends on the caption.
    """

    kind = "score"
    better = "higher"
    reads: ClassVar[bool] = True

    def scores(self, pictures: Tensor, captions: list[str]) -> Tensor:
        """(B,) float64 on the CPU; NaN where the measure does not apply to the caption.

        Args:
            pictures: (B, 3, H, W) in [-1, 1].
            captions: one per picture.
        """
        raise NotImplementedError


class EditScore(Measure):
    """A measure that gives every edited picture a number, and looks at the picture that was edited too."""

    kind = "score"
    better = "higher"

    def scores_of_edits(self, pictures: Tensor, sources: Tensor, captions: list[str]) -> Tensor:
        """As `Score.scores`.

        Args:
            pictures: edited pictures, (B, 3, H, W) in [-1, 1].
            sources: what they were made from, (B, 3, H', W') in [-1, 1].
            captions: the instruction of each.
        """
        raise NotImplementedError


class Distance(Measure):
    """A measure of two sets of pictures. It is 0 for a set and itself, and the same in both directions."""

    kind = "distance"
    better = "lower"

    def features(self, pictures: Tensor) -> Tensor:
        """(B, D) float32 on the CPU, from pictures (B, 3, H, W) in [-1, 1]. Each row depends on its picture alone."""
        raise NotImplementedError

    def distance(self, a: Tensor, b: Tensor) -> float:
        """The distance of two sets by their features, (N, D) and (M, D), N and M at least 2."""
        raise NotImplementedError
