"""Progress of one loop: a redrawn bar on a live terminal, else plain lines. Made by `Console.progress` only."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Protocol, Self

from dcgen_convert.core import pulse
from dcgen_convert.core.spelling import one_line

EVERY_FRACTION = 0.10
EVERY_SECONDS = 60.0
QUIET_SECONDS = 3.0  # shorter loops show their closing line only


class Speaker(Protocol):
    """What a bar needs of the console that made it."""

    @property
    def stderr(self) -> IO[str]: ...

    def say(self, text: str) -> None: ...

    def event(self, kind: str, **data: object) -> None: ...

    def colour(self) -> bool: ...


class Bar(Protocol):
    """What counts the units of a loop: a line or bar on the screen, or a rank that tells rank 0."""

    def advance(self, n: int = 1, **info: object) -> None: ...


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 05 s, 2 h 10 min, 3.4 days."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds < 2 * 86400:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{seconds / 86400:.1f} days"


def describe(info: dict[str, object]) -> str:
    """`loss 0.1234  lr 1e-4` from the keyword arguments of `advance`."""
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in info.items()
    )


class LineProgress:
    """One line per 10 % (at most one per 3 s) or per 60 s, with rate and time left. `total` None: unknown length,
    one line per 60 s.
    """

    live = False

    def __init__(
        self,
        console: Speaker,
        label: str,
        total: int | None,
        unit: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.label, self.total, self.unit = console, label, total, unit
        self.done = 0
        self.info: dict[str, object] = {}
        self._clock = clock
        self._start = self._last_time = clock()
        self._last_fraction = 0.0

    def __enter__(self) -> Self:
        self._start = self._last_time = self._clock()
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        elapsed = self._clock() - self._start
        state = "done" if kind is None else "stopped"
        self.console.event(
            "progress", label=self.label, done=self.done, total=self.total, state=state, seconds=round(elapsed, 3)
        )
        if kind is None and self.done:
            self.console.say(f"{self.label}: {self.done} {self.unit or 'items'} in {duration(elapsed)}" + self._tail())

    def advance(self, n: int = 1, **info: object) -> None:
        """`n` more units are done; keyword arguments are shown beside the bar (loss=..., lr=...)."""
        pulse.bump()
        self.done += n
        self.info.update(info)
        self._redraw()
        now = self._clock()
        fraction = self.done / self.total if self.total else 0.0
        tenth = fraction - self._last_fraction >= EVERY_FRACTION - 1e-9 and now - self._last_time >= QUIET_SECONDS
        if (tenth or now - self._last_time >= EVERY_SECONDS) and self.done not in (0, self.total):
            self._last_fraction = int(fraction / EVERY_FRACTION + 1e-9) * EVERY_FRACTION
            self._last_time = now
            self._line(fraction, now - self._start)

    def _line(self, fraction: float, elapsed: float) -> None:
        rate = elapsed / self.done
        left = (self.total - self.done) * rate if self.total else None
        self.console.event(
            "progress",
            label=self.label,
            done=self.done,
            total=self.total,
            state="running",
            seconds=round(elapsed, 3),
            eta_seconds=round(left, 1) if left is not None else None,
            **self.info,
        )
        if not self.live:
            count = f"{100 * fraction:.0f} %  {self.done}/{self.total}" if self.total else f"{self.done}"
            eta = f"  ETA {duration(left)}" if left is not None else ""
            self.console.say(f"{self.label}: {count} {self.unit}  {rate:.3g} s each{eta}{self._tail()}")

    def _tail(self) -> str:
        return f"  {describe(self.info)}" if self.info else ""

    def _open(self) -> None:
        return None

    def _redraw(self) -> None:
        return None

    def _close(self) -> None:
        return None


class SilentProgress(LineProgress):
    """Quiet consoles: events are still written, no line appears (`Console.say` is mute there)."""


class LiveProgress(LineProgress):
    """A Rich bar, removed when the loop ends and replaced by its one closing line."""

    live = True

    def _open(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}", markup=False),
        )
        stream = RichConsole(file=self.console.stderr, no_color=not self.console.colour(), stderr=True)
        self._bar = Progress(*columns, console=stream, transient=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task(one_line(self.label), total=self.total, info="")
        self._bar.start()

    def _redraw(self) -> None:
        self._bar.update(self._task, completed=self.done, info=one_line(describe(self.info)))

    def _close(self) -> None:
        self._bar.stop()
