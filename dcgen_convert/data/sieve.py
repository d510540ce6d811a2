"""Pictures that are smaller than what they are used at: found by their heads, left out and counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import decoding

Size = tuple[float, float]
ENOUGH = 2  # pictures that a conversion needs: one is held out


def square(side: int) -> Callable[[Size], Size]:
    """For pictures that are cropped to squares."""
    return lambda _: (side, side)


def area(side: int) -> Callable[[Size], Size]:
    """For pictures that keep their shapes, at about ``side``^2 px. The areas of buckets differ, so a quarter is
    granted.
    """
    return lambda size: (side * math.sqrt(0.75 * size[0] / size[1]), side * math.sqrt(0.75 * size[1] / size[0]))


@dataclass
class Sieve:
    """Which pictures are large enough.

    Attributes:
        side: shorter side in px of a square picture that is just large enough.
        key: the setting behind it.
        needed: (width, height) in px of a picture -> those that a picture of its shape must have.
        small: the pictures that were too small, with their (width, height).
    """

    side: int
    key: str
    needed: Callable[[Size], Size]
    small: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def passes(self, file: Path) -> bool:
        """Whether a picture is large enough. One that cannot be read passes: it is told when it is decoded."""
        try:
            with decoding.opened(file) as image:
                size = decoding.shown_size(image)
        except InputError:
            return True
        width, height = self.needed(size)
        if size[0] >= width and size[1] >= height:
            return True
        self.small[file] = size
        return False

    @property
    def reason(self) -> str:
        """Why pictures were left out."""
        return f"because they are smaller than {self.side} px ({self.key})"

    def require(self, count: int) -> None:
        """InputError when ``count`` pictures that pass are too few, and small ones were left out."""
        if count >= ENOUGH or not self.small:
            return
        width, height = max(self.small.values(), key=min)
        first = next(iter(self.small)).parent
        raise InputError(
            f"{len(self.small)} pictures in {first} are smaller than the {self.side} px that they are used at, the "
            f"largest is {width} x {height} px, and {'1 is' if count else 'none is'} large enough",
            f"give larger pictures; --set {self.key}={min(width, height)} allows smaller ones to be enlarged",
        )
