"""What binds the ranks of one job together: signs of life and failures in torch's store, and a ring of connections.

Each rank has three threads. What its main thread cannot end within a grace after a failure, they end.

- beat: writes once a second how far the main thread is, and reads what the others wrote. A rank that is stopped
  (SIGSTOP, a host that hangs) writes nothing; one that hangs writes the same count again (see `pulse`).
- ring: waits for a message from the rank before it, which comes at an orderly end. When that rank dies, its kernel
  closes the connection: that is noticed at once, also while nobody is in a collective.
- guard: notices that the store itself does not answer.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dcgen_convert.core import pulse
from dcgen_convert.core.errors import DcgenError, InternalError, InterruptedRun, RankLost, TerminatedRun

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

LOST_GRACE = 2.0  # seconds that the main thread has to end by itself after a rank was lost ...
FAILED_GRACE = 5.0  # ... and after a rank said why it failed: the others mostly fail of the same
TOLD_GRACE = 5.0  # seconds that a rank with an error of its own waits to hear that another rank is the cause
BROKEN_GRACE = 20.0  # seconds that a rank whose collective broke waits to hear which rank broke it
SILENCE = 120.0  # seconds without a sign of life or of progress: longer than any piece of work
BEAT = 1.0  # seconds between two signs of life, at most
COMING = 20.0  # seconds for all ranks to be there, at least: hosts load Python at different speeds
FAREWELL = 3.0  # longest wait for the others at the end
FAILURE, END, GONE = "failure", "end", "gone"  # keys of the store
PARENT = "DCGEN_PARENT"  # set for ranks that this command started: its process number


class Link:
    """One rank's end.

    Args:
        store: for the threads alone: a call that waits would hold back every other call.
        hosted: whether an elastic agent, which started the ranks, holds the store; else rank 0 does.
        log: this rank's log file.
        give_up: called in another thread when the main thread does not end in time; must end the process.
        silence: seconds without a sign of life or of progress that end the job, 0 for any number.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Store,
        hosted: bool,
        log: str,
        give_up: Callable[[DcgenError], None],
        silence: float,
    ):
        self.rank, self.world, self.log = rank, world, log
        self.failure: DcgenError | None = None
        self.said: dict[str, Any] = {"done": 0, "advanced": 0, "working": False, "met": False}  # to the others
        self.peers: dict[int, dict[str, Any]] = {}  # what they said last
        self.changed, self.wake = threading.Condition(), threading.Event()
        self.sign = pulse.sign()
        self._store, self._hosted, self._give_up, self._silence = store, hosted, give_up, silence
        self._me = {"rank": rank, "log": log, "pid": os.getpid(), "kernel": _kernel()}
        self._watched = [0] if rank else list(range(1, world))
        self._heard: dict[int, float] = {}
        self._guilty: set[int] = set()  # ranks that will not say farewell
        self._closing = False
        self._ring: ProcessGroup | None = None
        self._began = self._talked = time.monotonic()
        self._parent, self._activity = parent(), pulse.Activity()
        Path(log or os.devnull).parent.mkdir(parents=True, exist_ok=True)  # rank 0 may not have logged a line yet
        self._trace = open(log or os.devnull, "a")  # noqa: SIM115  lives as long as the process
        self._pause = min(BEAT, silence / 8) if silence else BEAT
        for work in (self._beat, self._guard):
            threading.Thread(target=work, daemon=True, name=work.__name__.strip("_")).start()

    def meet(self) -> None:
        """Wait until every rank is there, in Python: signals are heard."""
        with self.changed:
            while not (self.peers[0]["met"] if self.rank and self.peers else len(self.peers) == len(self._watched)):
                self.changed.wait(0.1)
                if self.failure:
                    raise self.failure
        self.said["met"] = True
        self.wake.set()

    def close_ring(self, ring: ProcessGroup) -> None:
        """Every rank is there: wait from now on for the rank before this one."""
        self._ring = ring
        self._last_word = threading.Thread(target=self._wait_for_left, daemon=True, name="ring")
        self._last_word.start()

    def settle(self, error: DcgenError, broken: bool = False) -> DcgenError:
        """What the job really failed of, given what this process failed of.

        A lost rank explains everything; a broken collective is explained by whoever broke it. An elastic agent sends
        SIGTERM to all ranks of its host when one of them ends: that is no wish of the user.
        """
        terminated = self._hosted and isinstance(error, TerminatedRun) and not self._alone()
        follows = isinstance(error, InternalError) or terminated
        with self.changed:
            if follows:
                self.changed.wait_for(lambda: self.failure is not None, BROKEN_GRACE if broken else TOLD_GRACE)
            if isinstance(self.failure, RankLost) or (self.failure and follows):
                return self.failure
        if self.rank and self.failure is None:
            self.report(error, [self.rank])
        return error

    def report(self, error: DcgenError, guilty: list[int], frozen: bool = False) -> None:
        """Let every rank know why the job ends. Only the first report of all counts."""
        document = {**error.document()["error"], "exit_code": error.exit_code, "guilty": guilty, "frozen": frozen}
        try:
            text = json.dumps({**document, "from": self.rank})
            document = json.loads(self._store.compare_set(FAILURE, "", text))
        except RuntimeError:  # nobody can be told; every rank finds out by itself
            self._note(error, LOST_GRACE)
        else:
            self._take(document)

    def end(self, code: int) -> None:
        """Leave a job that failed: rank 0 tells its exit code and waits until the others know it."""
        self._closing = True
        with suppress(RuntimeError):
            if self.rank:
                self._store.add(GONE, 1)
                return
            self._store.set(END, str(code))
            left, deadline = self.world - 1 - len(self._guilty - {0}), time.monotonic() + FAREWELL
            while self._store.add(GONE, 0) < left and time.monotonic() < deadline:
                time.sleep(0.05)

    def part(self) -> None:
        """An orderly end: the next rank hears it, and this one hears it from the rank before."""
        import torch

        self._closing = True
        faulthandler.cancel_dump_traceback_later()
        torch.distributed.send(torch.zeros(1), dst=(self.rank + 1) % self.world, group=self._ring)
        self._last_word.join(FAREWELL)

    def orphaned(self) -> None:
        """The process that started this rank died."""
        if not self._alone():  # rank 0 lives on another host
            message = f"the process that started rank {self.rank} was lost; its log is {self.log}"
            self.report(RankLost(message), [self.rank])

    def judge(self, now: float) -> None:
        """Called once a second: whether the others are still there."""
        for rank in self._watched:
            if rank not in self._heard and now - self._began > max(COMING, self._silence):
                self.report(RankLost(f"rank {rank} of {self.world} did not come; look at its log"), [rank], frozen=True)
            elif now - self._heard.get(rank, now) > self._silence:
                self.report(self._frozen(rank), [rank], frozen=True)

    def forgive(self, now: float) -> None:
        """Nobody could be heard until ``now``."""
        self._began, self._heard = now, dict.fromkeys(self._heard, now)

    def quiet(self, ranks: set[int], now: float) -> bool:
        """Whether one of ``ranks`` has been silent for long enough that it may be stopped."""
        return any(now - self._heard.get(rank, now) > self._silence / 4 for rank in ranks)

    def _note(self, error: DcgenError, grace: float) -> None:
        with self.changed:
            if self._closing or self.failure is not None:
                return
            self.failure = error
            self.changed.notify_all()
        timer = threading.Timer(grace, lambda: self._closing or self._give_up(error))
        timer.daemon = True
        timer.start()

    def _take(self, document: dict[str, Any]) -> None:
        """React to the failure in the store."""
        self._guilty = set(document["guilty"])
        if document["frozen"]:
            self._kill(self._guilty)
        log = self.log if document["from"] == self.rank else self._log_of(document["from"])
        self._note(failure(document, log), LOST_GRACE if document["code"] == RankLost.code else FAILED_GRACE)

    def _kill(self, ranks: set[int]) -> None:
        """A stopped process would stay for ever, so whoever can, kills it."""
        for peer in (self.peers[rank] for rank in ranks & self.peers.keys()):
            if peer["kernel"] == self._me["kernel"]:
                with suppress(OSError):
                    os.kill(peer["pid"], signal.SIGKILL)
        if ranks - self.peers.keys() and PARENT in os.environ:  # one that stopped before it told its number
            with suppress(psutil.Error):
                for sibling in psutil.Process(parent()).children():
                    if sibling.status() == psutil.STATUS_STOPPED:
                        sibling.kill()

    def _log_of(self, rank: int) -> str:
        key = f"beat/{rank}"
        return json.loads(self._store.get(key))["log"] if self._store.check([key]) else ""

    def _beat(self) -> None:
        before = self._began
        while not self._closing:
            if self._silence:  # a main thread that keeps Python's lock shows only so where it stands
                faulthandler.dump_traceback_later(0.9 * self._silence, file=self._trace)
            try:
                self._talk()
            except RuntimeError:
                return self._store_lost()
            now = self._talked = time.monotonic()
            if now - before > self._pause + self._silence / 2:  # this process was stopped, or the store was
                self.forgive(now)
            before = now
            if self._silence and self.failure is None:
                self.judge(now)
            self.wake.wait(self._pause)
            self.wake.clear()

    def _talk(self) -> None:
        now = time.monotonic()
        moved = self.said["working"] and pulse.count == self.sign.count and self._activity.seen(now)
        self.sign = pulse.sign(moved)
        self._store.set(f"beat/{self.rank}", json.dumps({**self._me, **self.said, "at": now, **asdict(self.sign)}))
        for rank in self._watched:
            if rank in self.peers or self._store.check([f"beat/{rank}"]):
                said = json.loads(self._store.get(f"beat/{rank}"))
                if said["at"] != self.peers.get(rank, {}).get("at"):
                    self._heard[rank] = time.monotonic()
                with self.changed:
                    self.peers[rank] = said
                    self.changed.notify_all()
        if self.failure is None and self._store.check([FAILURE]):
            self._take(json.loads(self._store.get(FAILURE)))
        if self.rank and self._store.check([END]):
            self._note(_ended(int(self._store.get(END))), LOST_GRACE if self.said["working"] else 0.0)

    def _guard(self) -> None:
        before = time.monotonic()
        while self._silence and not self._closing:
            time.sleep(self._pause)
            now = time.monotonic()
            if now - before > self._pause + self._silence / 2:  # this process was stopped
                self._talked = now
            before = now
            if now - self._talked > self._silence:
                if self._hosted:
                    message = (
                        f"torch's store has been silent for {self._silence:.0f} s: the process that started the ranks"
                    )
                    return self._note(RankLost(f"{message} is stopped, or its host hangs"), LOST_GRACE)
                self._note(self._frozen(0), LOST_GRACE)
                return self._kill({0})

    def _frozen(self, rank: int) -> RankLost:
        said = self.peers.get(rank)
        where = f"; it stood at {said['place']}; its log is {said['log']}" if said else ""
        silence = f"has been silent for {self._silence:.0f} s"
        return RankLost(f"rank {rank} {silence}: it is stopped, or its host hangs{where}")

    def _alone(self) -> bool:
        """Whether the process that started this rank and held the store died: SIGTERM ends it, with a checkpoint."""
        return self._hosted and os.environ.get("GROUP_RANK", "0") == "0" and os.getppid() != self._parent

    def _store_lost(self) -> None:
        time.sleep(self._pause)
        if not self._alone():
            lost = RankLost("the process that started rank 0 was lost: it was killed or it crashed")
            self._note(lost if self._hosted else self._broken(0), LOST_GRACE)

    def _broken(self, rank: int) -> RankLost:
        """The error of a rank whose connections broke.

        Whoever finds rank 0 frozen kills it, so that the others see its end: it was silent for long before that.
        """
        if rank == 0 and not self._hosted and 0 < 0.75 * self._silence < time.monotonic() - self._talked:
            return self._frozen(0)
        return RankLost(f"rank {rank} was lost: it was killed or it crashed")

    def _wait_for_left(self) -> None:
        import torch

        left = (self.rank - 1) % self.world
        with suppress(RuntimeError):
            torch.distributed.recv(torch.zeros(1), src=left, group=self._ring)
            return
        if self._closing or self.failure is not None or self._alone():
            return
        lost = self._broken(left)
        try:
            if not self._store.check([END]):
                self.report(RankLost(f"{lost.message}; its log is {self._log_of(left)}"), [left])
        except RuntimeError:
            self._note(lost, LOST_GRACE)


def parent() -> int:
    """The process that started this rank, also if it died before this one looked."""
    return int(os.environ.get(PARENT) or os.getppid())


def _kernel() -> str:
    """A name that is equal for two processes when the process numbers of one mean something to the other."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return boot.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"unknown {os.getpid()}"


def failure(document: dict[str, Any], log: str) -> DcgenError:
    """The error that a rank reported, as rank 0 tells it."""
    kinds = {"interrupted": InterruptedRun, "terminated": TerminatedRun, "rank-lost": RankLost}
    if document["code"] in kinds:
        return kinds[document["code"]](document["message"])
    hint = f"the traceback is in {log}" if document["code"] == "internal" else document["hint"]
    error = DcgenError(f"rank {document['from']}: {document['message']}", hint or f"its log is {log}")
    error.code, error.exit_code = document["code"], document["exit_code"]
    return error


def _ended(code: int) -> DcgenError:
    error = RankLost("rank 0 ended the job; it says why")
    error.exit_code = code
    return error
