"""What a run shows on the way, besides the figures of each step: evaluations and sample grids at intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgen_convert.core.files import atomic_write, read_lines, understood
from dcgen_convert.core.names import EVALUATIONS, MEASURES
from dcgen_convert.train.meter import Meter
from dcgen_convert.train.objective import Velocity

SAMPLES = "samples"  # folder beside the checkpoints


def sheet_of(folder: Path, step: int) -> Path:
    """The file of the sample grid that is drawn after ``step`` in the phase of ``folder``."""
    return folder / SAMPLES / f"step-{step:06d}.png"


@dataclass(frozen=True)
class Intervals:
    """When to evaluate and to draw, in steps; 0 disables each.

    Attributes:
        evaluate: steps between two evaluations of the held-out loss at fixed noise levels.
        grid: steps between two sample grids.
        draw: (velocity, step) -> None draws the grid, and writes `sheet_of` last. Called on every rank, after the
            checkpoint of that step was written. velocity is the network with its averaged weights: (z, t, text,
            guidance) -> (B, C, h, w).
        look: reads what the run has written so far. Called on rank 0, at the start and after each of these.
    """

    evaluate: int = 0
    grid: int = 0
    draw: Callable[[Velocity, int], None] | None = None
    look: Callable[[], None] | None = None


class TrainingWatch:
    """The evaluations and grids of one run.

    Args:
        meters: one for each span of the rows (see `meter`); empty: no such figures.
        evaluate: () -> losses by noise level with the averaged weights; collective.
        draw: step -> None; collective.
    """

    def __init__(
        self,
        folder: Path,
        intervals: Intervals,
        meters: Sequence[Meter] = (),
        evaluate: Callable[[], dict[str, float] | None] | None = None,
        draw: Callable[[int], None] | None = None,
    ) -> None:
        self.folder, self.intervals, self.meters = folder, intervals, meters
        self._evaluate, self._draw = evaluate, draw

    def wants_grid(self, step: int) -> bool:
        """Whether a grid is drawn after ``step``. A checkpoint must be written before."""
        every = self.intervals.grid
        return self._draw is not None and self.intervals.draw is not None and every > 0 and step % every == 0

    def after_step(self, step: int, speaks: bool) -> dict[str, float]:
        """Evaluate when it is due; the losses, or an empty dict."""
        every = self.intervals.evaluate
        losses = self._evaluate() if self._evaluate and every and step % every == 0 else None
        if losses and speaks:
            with open(self.folder / EVALUATIONS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **losses}) + "\n")
        if speaks and (losses or self.wants_grid(step)):
            self.look()
        return losses or {}

    def look(self) -> None:
        """Look at what the run has written so far."""
        if self.intervals.look:
            self.intervals.look()

    def after_save(self, step: int) -> None:
        """Draw the grid when it is due. A failure here costs no work: the checkpoint is on the disk."""
        if self._draw and self.wants_grid(step):
            self._draw(step)

    def forget(self, step: int) -> None:
        """Drop what was said of steps after ``step``, which a resumed run repeats."""
        for path in (self.folder / EVALUATIONS, self.folder / MEASURES):
            if path.exists():
                kept_lines(path, lambda line: line["step"] <= step)

    def missed(self, step: int) -> bool:
        """Whether the run was cut off after the checkpoint of ``step``, before its grid was there."""
        return self.wants_grid(step) and not sheet_of(self.folder, step).exists()


def kept_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of JSON lines with those that ``keep`` accepts; a line that was cut short is dropped."""
    lines = read_lines(path) if path.exists() else []
    with understood(path, "remove the damaged line"):
        kept = [line for i, line in enumerate(lines) if (found := _parsed(line, i + 1 == len(lines))) and keep(found)]
    atomic_write(path, "".join(line + "\n" for line in kept))


def _parsed(line: str, last: bool) -> dict[str, Any] | None:
    """What a line holds; None for the last one when it was cut short."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        if not last:
            raise
        return None
    return found


NONE = Intervals()
