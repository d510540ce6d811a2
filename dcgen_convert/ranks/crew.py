"""The ranks of one job: rank 0 walks through the stages, and the others wait for the tasks that it shares with them.

A task is a broadcast of its name and arguments on a gloo group of its own. Whether the others are done, how far they
are, and whether they are alive at all, travels through torch's store (see `link`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dcgen_convert.core import pulse
from dcgen_convert.core.errors import DcgenError, RankLost
from dcgen_convert.ranks.link import Link

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SHOWN = 4  # ranks named in one message


class Crew:
    """One process alone: what `Leader` and `Member` do for several is nothing here."""

    rank, world = 0, 1

    def introduce(self, document: dict[str, Any]) -> None:
        """Tell the others which job they belong to."""

    @contextmanager
    def share(self, task: str, bar: Any = None, together: bool = True, **arguments: Any) -> Iterator[None]:
        """The other ranks run ``task`` while the body runs here; leaves when all are done.

        Args:
            bar: progress that also counts what the others advance by.
            together: whether the ranks may wait for one another in the task (see `pulse.Progress.begin`).
        Raises:
            DcgenError: another rank failed or was lost.
        """
        yield

    def settle(self, error: DcgenError, broken: bool = False) -> DcgenError:
        """What the job really failed of, given what this process failed of; ``broken``: inside a collective."""
        return error

    def close(self, code: int) -> None:
        """The job ends with exit code ``code``."""

    def orphaned(self) -> None:
        """The process that started this rank died."""


SOLO = Crew()


class Linked(Link, Crew):
    """One of several ranks. The arguments are those of `link.Link`."""

    control: ProcessGroup  # for tasks

    def close(self, code: int) -> None:
        if code:
            return self.end(code)
        if self.rank == 0:
            self._tell(None)
        self.part()

    def _tell(self, message: Any) -> Any:
        """What rank 0 says, on every rank; waits for it."""
        import torch

        box = [message]
        torch.distributed.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


class Leader(Linked):
    """Rank 0."""

    def __init__(self, *place: Any):
        self._document: dict[str, Any] = {}
        self._number, self._shown = 0, 0  # the present task; what the bar shows of the others
        self._progress = pulse.Progress(place[-1])
        super().__init__(*place)

    def introduce(self, document: dict[str, Any]) -> None:
        self._document = document

    @contextmanager
    def share(self, task: str, bar: Any = None, together: bool = True, **arguments: Any) -> Iterator[None]:
        self._tell([self._document, task, arguments])
        with self.changed:
            self._progress.begin(time.monotonic(), together)
            self._number += 1
            self.said["working"] = True
        yield
        self.said.update(working=False, done=self._number)
        while True:
            with self.changed:
                self.wake.set()
                self.changed.wait(0.1)
                if self.failure:
                    raise self.failure
                advanced, left = sum(said["advanced"] for said in self.peers.values()), self._busy()
            if bar is not None and advanced > self._shown:
                bar.advance(advanced - self._shown)
            self._shown = advanced
            if not left:
                return

    def _busy(self) -> set[int]:
        """The ranks that have not yet done their part of the task."""
        return {rank for rank, said in [(0, self.said), *self.peers.items()] if said["done"] < self._number}

    def forgive(self, now: float) -> None:
        super().forgive(now)
        self._progress.forgive(now)

    def judge(self, now: float) -> None:
        super().judge(now)
        with self.changed:
            busy = self._busy()
            if self.failure is not None or self.quiet(busy, now):  # what is stopped looks like a hang at first
                return
            for rank in busy:
                said = self.peers.get(rank)
                self._progress.note(rank, pulse.Sign.of(said) if said else self.sign, now)
            found = self._progress.stalled(busy, now)
            seconds = max((self._progress.still(rank, now) for rank in found), default=0.0)
        if found:
            self.report(self._hung(found, seconds), list(found))

    def _hung(self, found: dict[int, pulse.Sign], seconds: float) -> RankLost:
        """The error of a job that stands still, with the ranks that hold it up."""
        logs = {rank: f", its log is {self.peers[rank]['log']}" if rank else "" for rank in found}
        places = [f"rank {rank} hangs at {sign.place}{logs[rank]}" for rank, sign in found.items()]
        more = f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        return RankLost(f"no rank has made progress for {seconds:.0f} s: {'; '.join(places[:SHOWN])}{more}")


class Member(Linked):
    """Another rank."""

    def advance(self, n: int = 1, **info: object) -> None:
        """Progress that rank 0 shows (this object is the `bar` of a shared task)."""
        pulse.bump()
        self.said["advanced"] += n

    def serve(self, perform: Callable[[dict[str, Any], str, dict[str, Any]], None]) -> int:
        """Run the tasks of rank 0 until it ends the job; its exit code.

        Args:
            perform: called with the job's document, the task's name and its arguments.
        """
        while (message := self._tell(None)) is not None:
            self.said["working"] = True
            perform(*message)
            self.said.update(working=False, done=self.said["done"] + 1)
            self.wake.set()
        return 0
