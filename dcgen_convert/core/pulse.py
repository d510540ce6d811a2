"""Whether the job gets on: a count of finished pieces of work in every process, and rank 0's judgement of all counts.

A process can be alive and yet hang: its other threads answer while the main thread waits for a dead disk or a GPU. So
the main thread counts what it has done (a micro-batch, a tensor of a checkpoint, a pass of a network).

The rule: every piece of work calls `bump`, and a piece must be shorter than `--rank-timeout`. What cannot count pieces
is no piece: while a process reads or writes files (weights that load, a download), imports modules, or has child
processes that compute (a compiler), it gets on too.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil

SLACK = 3  # times the longest pause between two pieces that is tolerated, whatever the timeout
FAST = 2**20  # bytes per second: files that are read or written faster than this are work
OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
FOREIGN = (sys.prefix, sys.base_prefix)
COLLECTIVE = os.path.join("torch", "distributed")

count = 0  # pieces of work that this process has done


def bump(*_: object) -> None:
    """One more piece of work is done. Takes and ignores everything, so that it can be a hook of a network."""
    global count  # noqa: PLW0603  one number per process, bumped in hot loops
    count += 1


@dataclass(frozen=True)
class Sign:
    """One look at a rank's main thread.

    count: pieces done; place: `file:line (function)` where it stands; waits: whether that is a wait for other ranks;
    busy: whether files move, modules are imported or child processes compute.
    """

    count: int
    place: str
    waits: bool
    busy: bool = False

    @classmethod
    def of(cls, said: dict[str, Any]) -> Sign:
        """The sign in what a rank said."""
        return cls(said["count"], said["place"], said["waits"], said["busy"])


def sign(busy: bool = False) -> Sign:
    """How this process's main thread stands; may be called in any thread."""
    frames = sys._current_frames()  # noqa: SLF001  Python's documented way to see other threads
    innermost = frame = frames.get(threading.main_thread().ident or 0)
    own, waits = None, False
    while frame is not None:
        waits = waits or COLLECTIVE in frame.f_code.co_filename
        own = own or (frame if _ours(frame.f_code.co_filename) else None)
        frame = frame.f_back
    return Sign(count, _named(own or innermost), waits, busy)


def broke_collective(error: BaseException) -> bool:
    """Whether ``error`` was raised inside a collective, as it is when another rank goes away."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(COLLECTIVE in frame.f_code.co_filename for frame, _ in frames)


def _ours(file: str) -> bool:
    return file.startswith(OURS) or (os.path.isabs(file) and not file.startswith(FOREIGN))


def _named(frame: FrameType | None) -> str:
    if frame is None:
        return "an unknown place"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"


class Activity:
    """What this process does beside its pieces: bytes of files, imported modules, seconds that children computed."""

    def __init__(self) -> None:
        self._now, self._before = 0.0, (0.0, 0, 0.0)

    def seen(self, now: float) -> bool:
        """Whether there was much of it since the last call, at time ``now``."""
        process, moved, computed = psutil.Process(), 0.0, 0.0
        with suppress(psutil.Error, AttributeError):  # not every system counts bytes
            io = process.io_counters()
            moved = io.read_bytes + io.write_bytes + io.read_chars + io.write_chars
        for child in process.children(recursive=True):
            with suppress(psutil.Error):
                computed += sum(child.cpu_times()[:2])
        found = (moved, len(sys.modules), computed)
        more = [after - before for after, before in zip(found, self._before, strict=True)]
        passed, self._now, self._before = now - self._now, now, found
        return more[0] > FAST * passed or more[1] > 0 or more[2] > passed / 10


class Progress:
    """What rank 0 knows of the work of all ranks in one task after the other. Times are seconds of any one clock.

    Args:
        timeout: seconds without progress that are tolerated.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self.begin(0.0)

    def begin(self, now: float, together: bool = True) -> None:
        """A new task: what the one before has shown says nothing about it.

        together: whether the ranks wait for one another. Then nobody is judged alone, as most waiting cannot be seen
            from outside: the job hangs when no rank gets on.
        """
        self._signs: dict[int, Sign] = {}
        self._begun: set[int] = set()
        self._moved: dict[int, float] = {}
        self._start, self._longest, self._together = now, 0.0, together

    def forgive(self, now: float) -> None:
        """The time until ``now`` counts for nothing: the whole job was suspended."""
        self._start, self._moved = now, dict.fromkeys(self._moved, now)

    def note(self, rank: int, found: Sign, now: float) -> None:
        """A look at ``rank``, which is at work."""
        before = self._signs.get(rank)
        self._signs[rank] = found
        if before is None or (found.count == before.count and not found.busy):
            return
        if found.count != before.count:
            if rank in self._begun:  # before the first piece a rank loads and compiles
                self._longest = max(self._longest, now - self._last(rank))
            self._begun.add(rank)
        self._moved[rank] = now

    def stalled(self, working: set[int], now: float) -> dict[int, Sign]:
        """The ranks that hold the job up, when it has stood still for too long; mostly none.

        Of the ``working`` ranks those that do not wait for others; of them those that have done least.
        """
        patience = max(self._timeout, SLACK * self._longest)
        still = {rank for rank in working if now - self._last(rank) > patience}
        signs = {rank: self._signs[rank] for rank in sorted(still) if rank in self._signs}
        signs = {rank: found for rank, found in signs.items() if not found.waits} or signs
        least = min((found.count for found in signs.values()), default=0)
        return {rank: found for rank, found in signs.items() if found.count == least}

    def still(self, rank: int, now: float) -> float:
        """Seconds since ``rank``, or any other that it may wait for, got on."""
        return now - self._last(rank)

    def _last(self, rank: int) -> float:
        moved = self._moved.values() if self._together else [self._moved.get(rank, self._start)]
        return max([self._start, *moved])
