"""Statistics of the stopwatch, with a clock that only moves when work is done."""

from __future__ import annotations

import pretend_device
import pytest
import torch

from dcgen_convert.judging.timing import MOST, ROUNDS, WARM_UP, Stopwatch


class Clock:
    """Seconds that pass only when ``work`` takes them. took: name -> seconds of its calls in order; the last stays."""

    def __init__(self, **took: list[float]) -> None:
        self.time, self.took, self.calls = 0.0, took, []

    def now(self) -> float:
        return self.time

    def works(self) -> dict:
        def work(name: str) -> None:
            times = self.took[name]
            self.time += times[min(self.calls.count(name), len(times) - 1)]
            self.calls.append(name)

        return {name: lambda name=name: work(name) for name in self.took}


def timed(clock: Clock, budget: float) -> dict:
    return Stopwatch(torch.device("cpu"), budget, clock.now).in_turn(clock.works())


def test_models_take_turns_and_what_warms_up_does_not_count():
    clock = Clock(a=[100.0] * WARM_UP + [3.0, 1.0, 8.0, 2.0, 2.0], b=[50.0] * WARM_UP + [0.5])
    found = timed(clock, 1e6)
    assert clock.calls == ["a", "b"] * (WARM_UP + ROUNDS)
    assert (found["a"].seconds, found["a"].low, found["a"].high) == (2.0, 1.0, 8.0)
    assert (found["b"].seconds, found["b"].rounds, found["b"].warm_up) == (0.5, ROUNDS, WARM_UP)


@pytest.mark.parametrize(
    ("each", "budget", "warm_up", "rounds"),
    [
        (1.0, 1000.0, 3, 10),
        (1.0, 8.0, 2, 6),  # a quarter of the time warms up; the rest counts
        (30.0, 60.0, 1, 1),
        (90.0, 60.0, 1, 1),  # longer than all the time there is
        (0.1, 60.0, 3, 20),  # short work is repeated for two seconds
        (0.001, 60.0, 3, MOST),
    ],
)
def test_the_time_bounds_the_rounds_and_one_always_counts(each, budget, warm_up, rounds):
    found = timed(Clock(a=[each]), budget)["a"]
    assert (found.warm_up, found.seconds) == (warm_up, pytest.approx(each))
    assert abs(found.rounds - rounds) <= (each < 1)  # sums of 0.1 are not exact


def test_the_clock_waits_for_the_device(monkeypatch):
    """Before the clock is read at both ends: else a GPU is still at work when the time is taken."""
    said = []
    with pretend_device.ready() as device:
        monkeypatch.setattr(torch.get_device_module(device), "synchronize", lambda: said.append("wait"), raising=False)
        watch = Stopwatch(torch.device(device), 1.0, lambda: said.append("clock") or 0.0)
        watch.once(lambda: said.append("work"))
    assert said == ["wait", "clock", "work", "wait", "clock"]


def test_the_peak_is_what_the_work_takes_beside_what_is_there():
    """64 MiB for a moment, beside 32 MiB that were there before; also in small pieces that the allocator would keep."""
    held = torch.ones(2**23)
    found = Stopwatch(torch.device("cpu"), 1.0).peak(lambda: torch.ones(2**24))
    assert held.sum() and found is not None and 60 * 2**20 < found < 80 * 2**20
    pieces = [2**13] * 2048  # 64 MiB, 32 KiB each

    def work() -> list:
        return [torch.ones(size) for size in pieces]

    work()
    found = Stopwatch(torch.device("cpu"), 1.0).peak(work)
    assert found is not None and 60 * 2**20 < found < 90 * 2**20
