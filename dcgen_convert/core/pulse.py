"""Whether the job gets on: a count of finished pieces of work in every process, and rank 0's judgement of all counts.

A process can be alive and yet hang: its other threads answer while the main one waits for a dead disk or a GPU. So the
main thread counts what it has done, however small (a micro-batch, a tensor of a checkpoint, a pass of a network),
and the signs of life that `crew` exchanges carry that count.

Ranks of one task wait for one another, and most waiting cannot be seen from outside. So nobody is judged alone: the
job has stalled when the count of no rank that is at work grows. One long piece is no stall: what is tolerated grows
with the longest pause that the task has shown, loading and compiling included.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from dataclasses import dataclass
from types import FrameType

PATIENCE = 5  # times the silence that makes a rank a frozen one: how long the job may stand still ...
FIRST = 30  # ... and until every rank has shown its first piece: weights are fetched, loaded and compiled
SLACK = 3  # times the longest pause so far that is tolerated whatever the silence
OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
FOREIGN = (sys.prefix, sys.base_prefix)
COLLECTIVE = os.path.join("torch", "distributed")

count = 0  # pieces of work that this process has done


def bump(*_: object) -> None:
    """One more piece of work is done. Takes and ignores everything, so that it can be a hook of a network."""
    global count
    count += 1


@dataclass(frozen=True)
class Sign:
    """One look at a rank's main thread.

    count: pieces done; place: `file:line (function)` where it stands; waits: whether that is a wait for other ranks.
    """

    count: int
    place: str
    waits: bool


def sign() -> Sign:
    """How this process's main thread stands; may be called in any thread."""
    innermost = frame = sys._current_frames().get(threading.main_thread().ident)
    own, waits = None, False
    while frame is not None:
        waits = waits or COLLECTIVE in frame.f_code.co_filename
        own = own or (frame if _ours(frame.f_code.co_filename) else None)
        frame = frame.f_back
    return Sign(count, _named(own or innermost), waits)


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


class Progress:
    """What rank 0 knows of the work of all ranks in one task after the other. Times are seconds of any one clock.

    Args:
        silence: seconds after which a silent rank counts as frozen.
    """

    def __init__(self, silence: float):
        self._silence = silence
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """A new task: what the one before has shown says nothing about it."""
        self._signs: dict[int, Sign] = {}
        self._begun: set[int] = set()
        self._moved, self._longest = now, 0.0

    def forgive(self, now: float) -> None:
        """The time until ``now`` counts for nothing: the whole job was suspended."""
        self._moved = now

    def note(self, rank: int, found: Sign, now: float) -> None:
        """A look at ``rank``, which is at work."""
        before = self._signs.get(rank)
        self._signs[rank] = found
        if before is not None and found.count != before.count:
            self._begun.add(rank)
            self._longest = max(self._longest, now - self._moved)
            self._moved = now

    def stalled(self, working: set[int], now: float) -> dict[int, Sign]:
        """The ranks that hold the job up, when it has stood still for too long; mostly none.

        Of the ``working`` ranks those that do not wait for others; of them those that have done least.
        """
        patience = max(self._silence * (PATIENCE if working <= self._begun else FIRST), SLACK * self._longest)
        if not working or now - self._moved <= patience:
            return {}
        signs = {rank: self._signs[rank] for rank in sorted(working) if rank in self._signs}
        signs = {rank: found for rank, found in signs.items() if not found.waits} or signs
        least = min((found.count for found in signs.values()), default=0)
        return {rank: found for rank, found in signs.items() if found.count == least}

    def still(self, now: float) -> float:
        """Seconds since any rank's count grew."""
        return now - self._moved
