"""How long each kind of work of a stage takes.

Stages mark their work with `timed`. Nothing is measured unless a rehearsal asks for it with `measuring`: a GPU must be
waited for to time its work, which a real run should not do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Kind:
    """One kind of work of a stage. count: units done; seconds: spent on them, the first piece of work apart.

    The first piece is slower: libraries choose their algorithms, and memory is taken from the system.
    """

    first: tuple[float, float] | None = None
    count: float = 0.0
    seconds: float = 0.0

    def add(self, count: float, seconds: float) -> None:
        """Note a piece of work of ``count`` units."""
        if self.first is None:
            self.first = count, seconds
        else:
            self.count += count
            self.seconds += seconds

    @property
    def total(self) -> float:
        """Units, the first piece included."""
        return self.count + (self.first[0] if self.first else 0.0)

    @property
    def each(self) -> float:
        """Seconds of one unit, from all pieces but the first if there are others."""
        count, seconds = (self.count, self.seconds) if self.count else (self.first or (0.0, 0.0))
        return seconds / count if count else 0.0


@dataclass
class Clock:
    """What was measured: stage -> kind of work. wait: returns when the device has done all that it was given."""

    wait: Callable[[], None]
    stages: dict[str, dict[str, Kind]] = field(default_factory=dict)
    stage: str = "start"
    names: dict[str, str] = field(default_factory=dict)
    inner: list[float] = field(default_factory=list)  # of every piece of work in progress: seconds of pieces within it

    def now(self) -> float:
        """Seconds, with the device's work done."""
        self.wait()
        return time.perf_counter()

    def add(self, what: str, count: float, seconds: float) -> None:
        """Note a piece of work of ``count`` units in the present stage."""
        kinds = self.stages.setdefault(self.stage, {})
        kinds.setdefault(self.names.get(what, what), Kind()).add(count, seconds)

    @contextmanager
    def timed(self, what: str, count: float | Callable[[], float]) -> Iterator[None]:
        """Note what is done inside; work that is marked within it counts there alone."""
        begun = self.now()
        self.inner.append(0.0)
        try:
            yield
        finally:
            spent = self.now() - begun
            within = self.inner.pop()
            if self.inner:
                self.inner[-1] += spent
        self.add(what, count() if callable(count) else count, max(0.0, spent - within))

    def figures(self) -> dict[str, dict[str, dict[str, float]]]:
        """stage -> kind of work -> count and seconds_each."""
        return {
            stage: {what: {"count": kind.total, "seconds_each": kind.each} for what, kind in kinds.items()}
            for stage, kinds in self.stages.items()
        }


_clock: Clock | None = None  # one per process, like the clock on the wall


def running() -> Clock | None:
    """The clock of a rehearsal; None in other runs."""
    return _clock


@contextmanager
def measuring(wait: Callable[[], None]) -> Iterator[Clock]:
    """Inside, work is measured. wait: as in `Clock`."""
    global _clock  # noqa: PLW0603
    _clock = Clock(wait)
    try:
        yield _clock
    finally:
        _clock = None


@contextmanager
def timed(what: str, count: float | Callable[[], float] = 1) -> Iterator[None]:
    """Mark work: ``count`` units of the kind ``what``, as planning/bill.py names and counts them. Main thread only.

    Args:
        count: a function is asked when the work is done.
    """
    if _clock is None:
        yield
    else:
        with _clock.timed(what, count):
            yield


@contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """Inside, kinds of work have other names (old -> new): the same drawing serves several purposes."""
    if _clock is None:
        yield
        return
    before, _clock.names = _clock.names, names
    try:
        yield
    finally:
        _clock.names = before


def begin(stage: str) -> None:
    """From now on, work belongs to ``stage``."""
    if _clock is not None:
        _clock.stage = stage
