"""A phase whose time is up ends early, at a checkpoint, and stays ended. A step takes a second of a made-up clock."""

import json
import math
from dataclasses import replace
from itertools import count, pairwise
from types import SimpleNamespace

import pytest

from dcgen_convert.train import loop
from dcgen_convert.train.loop import METRICS

from .test_adapt import Hook
from .test_train_checkpoints import exported, same
from .train_worker import adapt, engine_settings, losses, run_ranks

CONSTANT = {"schedule": "constant"}


class Stop(Exception):
    """Ends a run in the middle, as a kill would."""


class Clock(Hook):
    """A console that counts the steps as seconds, and stops the run after ``last``."""

    def __init__(self, monkeypatch, last=math.inf):
        super().__init__(self.tick)
        self.now, self.last, self.warned = 0, last, []
        moments = count()
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: self.now + 1e-6 * next(moments)))

    def tick(self, _info):
        self.now += 1
        if self.now == self.last:
            raise Stop

    def warn(self, text):
        self.warned.append(text)


def rates(folder) -> list[float]:
    return [json.loads(line)["lr"] for line in (folder / METRICS).read_text().splitlines()]


def test_a_phase_ends_at_its_deadline_and_a_resumed_run_trains_no_longer(tmp_path, monkeypatch):
    """What it exports, the moving average too, is bitwise that of a phase with so many steps."""
    console = Clock(monkeypatch)
    found, _ = adapt(tmp_path / "early", phase=CONSTANT, console=console, deadline=4.5)
    assert (found["steps"], found["ended"]) == (5, {"step": 5, "of": 12, "learning_rate": 3e-3})
    assert "ended after step 5 of 12, at learning rate 0.003" in console.warned[0]
    five, _ = adapt(tmp_path / "five", phase={**CONSTANT, "steps": 5})
    assert "ended" not in five
    assert same(exported(tmp_path / "early"), exported(tmp_path / "five"))
    for deadline in (None, 1e9):
        again, _ = adapt(tmp_path / "early", phase=CONSTANT, console=Clock(monkeypatch), deadline=deadline)
        assert (again["steps"], again["ended"]) == (5, found["ended"])
        assert same(exported(tmp_path / "early"), exported(tmp_path / "five"))
    longer, _ = adapt(tmp_path / "early", phase={**CONSTANT, "steps": 14})  # that is asking for more
    adapt(tmp_path / "whole", phase={**CONSTANT, "steps": 14})
    assert longer["steps"] == 14
    assert losses(tmp_path / "early") == losses(tmp_path / "whole")


def test_a_cosine_ends_at_the_deadline_and_does_not_jump(tmp_path, monkeypatch):
    """The checkpoint of step 4 sees that the time is enough for 8 steps, not for 12. A kill changes nothing."""
    setup = {"saving": (4, 0.0), "deadline": 8.5}
    found, _ = adapt(tmp_path / "short", console=Clock(monkeypatch), **setup)
    assert (found["steps"], found["ended"]["of"]) == (8, 12)
    adapt(tmp_path / "planned")
    short, planned = rates(tmp_path / "short"), rates(tmp_path / "planned")
    assert short[:5] == planned[:5]
    assert short[5] < planned[5]
    assert all(later < earlier for earlier, later in pairwise(short[3:]))
    assert short[7] < 0.2 * max(short) < planned[7]
    assert found["ended"]["learning_rate"] == short[7]
    clock = Clock(monkeypatch, last=6)
    with pytest.raises(Stop):
        adapt(tmp_path / "killed", console=clock, **setup)
    clock.last, clock.now = math.inf, 4
    resumed, _ = adapt(tmp_path / "killed", console=clock, **setup)
    assert (resumed["resumed_from"], resumed["ended"]) == (4, found["ended"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "short")
    assert same(exported(tmp_path / "killed"), exported(tmp_path / "short"))


def test_a_cosine_that_turns_goes_on_from_where_it_is():
    planned = engine_settings(steps=100, warmup=10)
    short = planned.turned(40, 60)
    assert short.last == 60
    assert [short.rate_factor(step) for step in range(41)] == [planned.rate_factor(step) for step in range(41)]
    assert short.rate_factor(60) == pytest.approx(0)
    longer = short.turned(50, 80)  # it was faster than the first look had said
    assert longer.rate_factor(50) == pytest.approx(short.rate_factor(50))
    assert longer.rate_factor(80) == pytest.approx(0)
    assert all(longer.rate_factor(step + 1) < longer.rate_factor(step) for step in range(50, 80))
    assert replace(planned, turn=None) == planned


def test_the_last_rank_decides_for_all(tmp_path):
    """Time is up on rank 1 alone: both end after the same step."""
    job = {"folder": str(tmp_path / "run"), "phase": CONSTANT, "late": 1}
    assert run_ranks(2, [job], tmp_path / "ranks.log") == [""] * 2
    assert len(losses(tmp_path / "run")) == 1
