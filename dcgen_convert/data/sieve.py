"""Pictures that are smaller than what they are used at, and videos that are too short: found by their heads, left out
and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import decoding, videos

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
    """Which pictures are large enough, or which videos are large and long enough.

    Attributes:
        side: shorter side in px of a square picture that is just large enough.
        key: the setting behind it.
        needed: (width, height) in px of a picture -> those that a picture of its shape must have.
        frames: that a video must have; 0: they are pictures. fps: frames a second of the videos that the model draws.
        small: the pictures that were too small, with their (width, height).
        short: the videos that were too short, with their frames.
    """

    side: int
    key: str
    needed: Callable[[Size], Size]
    frames: int = 0
    fps: float = 0
    small: dict[Path, tuple[int, int]] = field(default_factory=dict)
    short: dict[Path, int] = field(default_factory=dict)

    def passes(self, file: Path) -> bool:
        """Whether a picture is large enough. One that cannot be read passes: it is told when it is decoded."""
        try:
            size, frames = self._measured(file)
        except InputError:
            return True
        width, height = self.needed(size)
        if frames < self.frames:
            self.short[file] = frames
        elif size[0] < width or size[1] < height:
            self.small[file] = size
        else:
            return True
        return False

    def _measured(self, file: Path) -> tuple[tuple[int, int], int]:
        """(width, height) in px, and the frames up to those that are needed; 0 of a picture."""
        if self.frames:
            width, height, frames = videos.shape(file, self.frames, self.fps)
            return (width, height), frames
        with decoding.opened(file) as image:
            return decoding.shown_size(image), 0

    @property
    def dropped(self) -> list[Path]:
        """What was left out."""
        return [*self.small, *self.short]

    def reason(self, file: Path) -> str:
        """Why a picture was left out; empty: it was not."""
        return self._too_small if file in self.small else self._too_short if file in self.short else ""

    @property
    def told(self) -> str:
        """What was left out and why, as the end of a sentence; empty where nothing was."""
        counts = ((len(self.small), self._too_small), (len(self.short), self._too_short))
        return "".join(f", {count:,} are left out {why}" for count, why in counts if count)

    @property
    def _too_small(self) -> str:
        return f"because they are smaller than {self.side} px ({self.key})"

    @property
    def _too_short(self) -> str:
        return f"because they have fewer than {self.frames} frames{self._rate} (data.frames)"

    @property
    def _rate(self) -> str:
        return f" at {self.fps:g} a second" if self.fps else ""

    def require(self, count: int) -> None:
        """InputError when ``count`` pictures that pass are too few, and others were left out."""
        if count >= ENOUGH or not self.dropped:
            return
        rest = "1 is" if count else "none is"
        first = self.dropped[0].parent
        if self.short:
            raise InputError(
                f"{len(self.short)} videos in {first} have fewer than the {self.frames} frames{self._rate} that they "
                f"are used at, the longest has {max(self.short.values())}, and {rest} long enough",
                "give longer videos, or a smaller number with --set data.frames=N",
            )
        width, height = max(self.small.values(), key=min)
        noun = "videos" if self.frames else "pictures"
        raise InputError(
            f"{len(self.small)} {noun} in {first} are smaller than the {self.side} px that they are used at, the "
            f"largest is {width} x {height} px, and {rest} large enough",
            f"give larger {noun}; --set {self.key}={min(width, height)} allows smaller ones to be enlarged",
        )
