"""The ranks of one job, and the line that holds them together.

Rank 0 walks through the stages; the others wait for the tasks that it shares with them. Every rank keeps one TCP
connection to rank 0 open. Tasks, progress and failures travel on it as JSON lines, and the kernel closes it when a
process dies, of whatever. A thread reads it: no rank waits for a dead one, not even inside a collective that would wait
for half an hour. What the main thread cannot end within a grace, that thread ends.

A process that is stopped (SIGSTOP, a frozen container, a host that hangs) keeps its connections. So both ends also say
every few seconds that they are there, from a thread of their own, and whoever is silent for `SILENCE` counts as lost.
What they say includes how far their main thread is: rank 0 ends a job that stands still (see `pulse`).
"""

from __future__ import annotations

import json
import math
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from dcgen_convert.core import pulse
from dcgen_convert.core.errors import DcgenError, InternalError, InterruptedRun, RankLost, TerminatedRun

LOST_GRACE = 2.0  # seconds that the main thread has to end by itself after a rank was lost ...
BROKEN_GRACE = (
    20.0  # seconds that a rank whose collective broke waits to hear which rank broke it: a busy one is slow to tell
)
FAILED_GRACE = 5.0  # ... and after a rank said why it failed: the others mostly fail of the same
SILENCE = 120.0  # seconds without a sign of life: longer than any call that keeps Python's lock
BEAT = 5.0  # seconds between two signs of life, at most
FAREWELL = 5.0  # seconds that rank 0 waits for the others at the end
SHOWN = 4  # ranks named in one message


class Crew:
    """One process alone: what `Leader` and `Member` do for several is nothing here."""

    rank, world = 0, 1

    def introduce(self, document: dict[str, Any]) -> None:
        """Tell the others which job they belong to."""

    @contextmanager
    def share(self, task: str, bar: Any = None, **arguments: Any) -> Iterator[None]:
        """The other ranks run ``task`` while the body runs here; leaves when all are done.

        Args:
            bar: progress that also counts what the others advance by.
        Raises:
            DcgenError: another rank failed or was lost.
        """
        yield

    def settle(self, error: DcgenError, broken: bool = False) -> DcgenError:
        """What the job really failed of, given what this process failed of; ``broken``: in the middle of a
        collective.
        """
        return error

    def close(self, code: int) -> None:
        """The job ends with exit code ``code``."""


SOLO = Crew()


@dataclass
class Peer:
    """The other end of one line."""

    rank: int
    socket: socket.socket
    log: str = ""
    rest: bytes = b""
    heard: float = math.inf  # monotonic time of the last sign of life; before the first, none is missed
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, document: dict[str, Any]) -> None:
        """One line; a peer that is gone is noticed by the reader."""
        try:
            with self.lock:
                self.socket.sendall(json.dumps(document).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """The whole lines that have arrived (blocks until there is something); None at the end of the line."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None


class _Linked(Crew):
    """What both ends share: one failure noted, and an end that does not depend on the main thread.

    Args:
        give_up: called in the reading thread when the main thread did not end in time; must end the process.
        silence: seconds after which a silent peer counts as lost, 0 for never.
    """

    def __init__(self, rank: int, world: int, give_up: Callable[[DcgenError], None], silence: float):
        self.rank, self.world, self._give_up, self._silence = rank, world, give_up, silence
        self.failure: DcgenError | None = None
        self._changed = threading.Condition()
        self._closing = False

    def _start_beating(self, peers: list[Peer], frozen: Callable[[Peer], None]) -> None:
        """Say and check from now on that both ends are there; ``frozen`` is called once for a silent peer."""
        if self._silence:
            threading.Thread(target=self._beat, args=(peers, frozen), daemon=True, name="beat").start()

    def _beat(self, peers: list[Peer], frozen: Callable[[Peer], None]) -> None:
        pause = min(BEAT, self._silence / 8)
        watched, before = list(peers), time.monotonic()
        while watched and not self._closing:
            sign = _beat()
            for peer in watched:
                peer.send(sign)
            time.sleep(pause)
            now = time.monotonic()
            stopped = now - before > pause + self._silence / 2  # this process itself was: it has not listened
            if stopped:
                for peer in watched:
                    peer.heard = max(peer.heard, now)
            before = now
            for peer in [peer for peer in watched if now - peer.heard > self._silence]:
                watched.remove(peer)
                frozen(peer)
            self._look(now, stopped)

    def _look(self, now: float, stopped: bool) -> None:
        """Called after every round of signs; stopped: this process itself was suspended since the last one."""

    def _frozen(self, peer: Peer) -> RankLost:
        log = f"; its log is {peer.log}" if peer.log else ""
        return RankLost(
            f"rank {peer.rank} has been silent for {self._silence:.0f} s: it is stopped, or its host hangs{log}"
        )

    def _note(self, error: DcgenError, grace: float) -> None:
        with self._changed:
            worse = isinstance(error, RankLost) and not isinstance(self.failure, RankLost)
            if self._closing or not (self.failure is None or worse):
                return
            if self.failure is None:
                timer = threading.Timer(grace, self._force)
                timer.daemon = True
                timer.start()
            self.failure = error
            self._changed.notify_all()

    def _force(self) -> None:
        if not self._closing:
            self._give_up(self.failure)

    def settle(self, error: DcgenError, broken: bool = False) -> DcgenError:
        """A lost rank explains everything; a broken collective is explained by whoever broke it."""
        with self._changed:
            if isinstance(error, InternalError):
                grace = BROKEN_GRACE if broken else LOST_GRACE
                self._changed.wait_for(lambda: self.failure is not None, timeout=grace)
            if isinstance(self.failure, RankLost) or (self.failure and isinstance(error, InternalError)):
                return self.failure
        return error


class Leader(_Linked):
    """Rank 0's end of the lines."""

    def __init__(self, peers: list[Peer], give_up: Callable[[DcgenError], None], silence: float = SILENCE):
        super().__init__(0, len(peers) + 1, give_up, silence)
        self._peers = peers
        self._busy: set[int] = set()  # ranks that have not yet done their part of the task, this one included
        self._advanced = 0
        self._gone: set[int] = set()
        self._progress = pulse.Progress(silence)
        for peer in peers:
            peer.heard = time.monotonic()  # the first of them may have waited long for the last
        threading.Thread(target=self._watch, daemon=True, name="crew").start()
        self._start_beating(peers, lambda peer: self._lose(peer, self._frozen(peer)))

    def introduce(self, document: dict[str, Any]) -> None:
        self._send_all({"kind": "job", "document": document})

    @contextmanager
    def share(self, task: str, bar: Any = None, **arguments: Any) -> Iterator[None]:
        with self._changed:
            self._busy, self._advanced = set(range(self.world)), 0
            self._progress.begin(time.monotonic())
            self._progress.note(0, pulse.sign(), time.monotonic())
        self._send_all({"kind": "task", "task": task, "arguments": arguments})
        yield
        with self._changed:
            self._busy.discard(0)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.failure or not self._busy, timeout=1.0)
                if self.failure:
                    raise self.failure
                advanced, self._advanced = self._advanced, 0
                left = bool(self._busy)
            if bar is not None and advanced:
                bar.advance(advanced)
            if not left:
                return

    def close(self, code: int) -> None:
        with self._changed:
            self._closing = True
        self._send_all({"kind": "end", "code": code})
        with self._changed:
            self._changed.wait_for(lambda: len(self._gone) == len(self._peers), timeout=FAREWELL if code == 0 else 0)

    def _send_all(self, document: dict[str, Any]) -> None:
        for peer in self._peers:
            peer.send(document)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as lines:
            for peer in self._peers:
                lines.register(peer.socket, selectors.EVENT_READ, peer)
            while lines.get_map():
                for key, _ in lines.select():
                    peer = key.data
                    messages = peer.receive()
                    for message in messages or []:
                        self._take(peer, message)
                    if messages is None:
                        lines.unregister(peer.socket)
                        self._lose(peer)

    def _take(self, peer: Peer, message: dict[str, Any]) -> None:
        with self._changed:
            if message["kind"] == "done":
                self._busy.discard(peer.rank)
            elif message["kind"] == "advance":
                self._advanced += message["count"]
            elif message["kind"] == "beat" and peer.rank in self._busy:
                sign = pulse.Sign(message["count"], message["place"], message["waits"])
                self._progress.note(peer.rank, sign, time.monotonic())
            self._changed.notify_all()
        if message["kind"] == "failed":
            self._gone.add(peer.rank)
            self._note(_failure(peer, message), FAILED_GRACE)

    def _look(self, now: float, stopped: bool) -> None:
        with self._changed:
            if stopped:
                self._progress.forgive(now)
            if 0 in self._busy:
                self._progress.note(0, pulse.sign(), now)
            guilty, seconds = self._progress.stalled(self._busy, now), self._progress.still(now)
        if guilty and self.failure is None:
            self._end(_hung(guilty, seconds, {peer.rank: peer.log for peer in self._peers}))

    def _end(self, error: RankLost) -> None:
        """Tell everyone, and end."""
        self._send_all({"kind": "end", "code": error.exit_code})
        self._note(error, LOST_GRACE)

    def _lose(self, peer: Peer, error: RankLost | None = None) -> None:
        with self._changed:
            lost = peer.rank not in self._gone and not self._closing
            self._gone.add(peer.rank)
            self._changed.notify_all()
        if lost:
            self._end(
                error or RankLost(f"rank {peer.rank} was lost: it was killed or it crashed; its log is {peer.log}")
            )


class Member(_Linked):
    """Another rank's end of its line."""

    def __init__(
        self, rank: int, world: int, line: Peer, give_up: Callable[[DcgenError], None], silence: float = SILENCE
    ):
        super().__init__(rank, world, give_up, silence)
        self._line = line
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True, name="crew").start()
        self._start_beating([line], lambda peer: self._lose(self._frozen(peer)))

    def advance(self, n: int = 1, **info: object) -> None:
        """Progress that rank 0 shows (this object is the `bar` of a shared task)."""
        pulse.bump()
        self._line.send({"kind": "advance", "count": n})

    def serve(self, perform: Callable[[dict[str, Any], str, dict[str, Any]], None]) -> int:
        """Run the tasks of rank 0 until it ends the job; its exit code.

        Args:
            perform: called with the job's document, the task's name and its arguments.
        """
        document: dict[str, Any] = {}
        while True:
            message = self._inbox.get()
            if message["kind"] == "end":
                if self.failure is not None and message.get("lost"):
                    raise self.failure
                return message["code"]
            if message["kind"] == "job":
                document = message["document"]
            else:
                self._line.send(_beat())  # before any work: what is done between two beats must show too
                perform(document, message["task"], message["arguments"])
                self._line.send({"kind": "done"})

    def settle(self, error: DcgenError, broken: bool = False) -> DcgenError:
        settled = super().settle(error, broken)
        if settled is error and self.failure is None:
            self._line.send({"kind": "failed", **error.document()["error"], "exit_code": error.exit_code})
        return settled

    def close(self, code: int) -> None:
        self._closing = True

    def _read(self) -> None:
        while (messages := self._line.receive()) is not None:
            for message in messages:
                if message["kind"] == "beat":
                    continue
                self._inbox.put(message)
                if message["kind"] == "end":
                    if message["code"]:
                        self._note(_ended(message["code"]), LOST_GRACE)
                    return
        self._lose(RankLost("rank 0 was lost: it was killed or it crashed"))

    def _lose(self, lost: RankLost) -> None:
        self._note(lost, LOST_GRACE)
        self._inbox.put({"kind": "end", "code": lost.exit_code, "lost": True})


def _failure(peer: Peer, message: dict[str, Any]) -> DcgenError:
    """The error that a rank reported, as rank 0 tells it."""
    kinds = {"interrupted": InterruptedRun, "terminated": TerminatedRun}
    if message["code"] in kinds:
        return kinds[message["code"]](message["message"])
    hint = f"the traceback is in {peer.log}" if message["code"] == "internal" else message["hint"]
    error = DcgenError(f"rank {peer.rank}: {message['message']}", hint or f"its log is {peer.log}")
    error.code, error.exit_code = message["code"], message["exit_code"]
    return error


def _beat() -> dict[str, Any]:
    return {"kind": "beat", **asdict(pulse.sign())}


def _hung(guilty: dict[int, pulse.Sign], seconds: float, logs: dict[int, str]) -> RankLost:
    """The error of a job that stands still, with the ranks that hold it up."""
    places = [
        f"rank {rank} hangs at {sign.place}" + (f", its log is {logs[rank]}" if logs.get(rank) else "")
        for rank, sign in guilty.items()
    ]
    shown = "; ".join(places[:SHOWN]) + (f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else "")
    return RankLost(f"no rank has made progress for {seconds:.0f} s: {shown}")


def _ended(code: int) -> DcgenError:
    error = RankLost("rank 0 ended the job; it says why")
    error.exit_code = code
    return error
