"""The clock of a benchmark: several pieces of work in turn, median of the rounds, and the memory that one takes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dcgen_convert.core import resident

WARM_UP, ROUNDS = 3, 10  # rounds that do not count, and the fewest that do where the time allows them
MOST, ENOUGH = 100, 2.0  # short work is repeated up to so many rounds, or for so many seconds in all

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one piece of work. seconds: the median; low, high: of the rounds that count; warm_up: the others.

    peak: bytes that it takes, see `Stopwatch.peak`.
    """

    seconds: float
    low: float
    high: float
    rounds: int
    warm_up: int
    peak: int | None = None


@dataclass(frozen=True)
class Stopwatch:
    """Measures on one device.

    Attributes:
        device: where the work is done.
        budget: seconds that one comparison may take. The round in which they end is the last one; at least one counts.
        now: seconds.
    """

    device: torch.device
    budget: float
    now: Callable[[], float] = time.perf_counter

    def wait(self) -> None:
        """Return when the device has done all that it was given."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def once(self, work: Work) -> float:
        """Seconds of one call of ``work``, with all that the device does for it."""
        self.wait()
        begun = self.now()
        work()
        self.wait()
        return self.now() - begun

    def in_turn(self, works: Mapping[str, Work]) -> dict[str, Timing]:
        """Time of every one of ``works``: A, B, A, B, ... so that what slows the machine for a while slows all.

        The first round, which warms up, measures the memory.
        """
        begun = self.now()
        peaks = {name: self.peak(work) for name, work in works.items()}
        warm = 1
        while warm < WARM_UP and self.now() - begun < self.budget / 4:
            for work in works.values():
                self.once(work)
            warm += 1
        spent: dict[str, list[float]] = {name: [] for name in works}
        rounds, started = 0, self.now()
        while rounds == 0 or (rounds < MOST and self._goes_on(rounds, begun, started)):
            for name, work in works.items():
                spent[name].append(self.once(work))
            rounds += 1
        return {
            name: Timing(statistics.median(all_), min(all_), max(all_), rounds, warm, peaks[name])
            for name, all_ in spent.items()
        }

    def _goes_on(self, rounds: int, begun: float, started: float) -> bool:
        now = self.now()
        round_ = (now - started) / rounds
        if now - begun + round_ > self.budget:
            return False
        return rounds < ROUNDS or now - started < ENOUGH

    def peak(self, work: Work) -> int | None:
        """Bytes that ``work`` takes beside what is there already: weights and inputs. None where nothing tells.

        On a GPU what torch allocates. On a CPU what the resident memory of the process grows by; where the
        allocator cannot give back what it kept from earlier calls, a lower bound.
        """
        self.wait()
        gc.collect()  # what goes away meanwhile would be taken off
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            work()
            self.wait()
            return torch.cuda.max_memory_allocated(self.device) - before
        resident.give_back()
        resident.forget()
        resting = resident.now()
        work()
        self.wait()
        highest = resident.highest()
        if self.device.type != "cpu" or resting is None or highest is None:
            return None
        return max(0, highest - resting)
