"""Stages 2 and 3 end to end on the tiny model."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from dcgen_convert.console import NULL
from dcgen_convert.errors import CheckFailed, InputError, RecipeError, Terminated
from dcgen_convert.train import loop
from dcgen_convert.train.adapt import train_head
from dcgen_convert.train.checkpoints import whole
from dcgen_convert.train.loop import Curve, Order, Saving

from .train_worker import FLUX, SCHEDULER, Rows, adapt, adapt_section, losses, tiny_flux


class Hook:
    """A console whose progress bar calls a function after every step."""

    def __init__(self, action):
        self.action, self.said = action, []

    def progress(self, *args):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None

    def advance(self, *args, **info):
        self.action(info)

    def say(self, text):
        self.said.append(text)


def test_lora_phase_learns_and_reports(tmp_path):
    seen = []
    metrics, model = adapt(
        tmp_path,
        phase={"steps": 60, "batch": 16, "micro_batch": 16, "lr": 1e-2},
        adapt={"ema": 0.9},
        console=Hook(seen.append),
        held_out=Rows(8, seed=1),
    )
    assert metrics["steps"] == 60 and metrics["resumed_from"] is None
    assert metrics["loss_last"] < 0.96 * metrics["loss_first"]
    assert metrics["evaluation"]["after"]["mean"] < 0.99 * metrics["evaluation"]["before"]["mean"]
    assert len(seen) == 60 and set(seen[0]) == {"loss", "grad_norm", "lr", "samples_per_s"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"step", "loss", "grad_norm", "lr", "seconds", "samples_per_second"} and len(lines) == 60
    # frozen is frozen; embedder and head in memory are what was exported; the adapter is off
    exported, before = load_file(metrics["exports"]["modules"]), tiny_flux().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, exported.get(name, before[name]))
    assert metrics["trained_parameters"] == sum(
        v.numel() for p in metrics["exports"].values() for v in load_file(p).values()
    )


def test_the_last_phase_of_a_finished_run_is_not_trained_again(tmp_path):
    first, _ = adapt(tmp_path)
    second, _ = adapt(tmp_path)
    assert second["resumed_from"] == second["steps"] == 12 and second["samples_per_second"] is None
    assert load_file(first["exports"]["lora"]).keys() == load_file(second["exports"]["lora"]).keys()


def test_head_stage_trains_embedder_and_head_only(tmp_path):
    from types import SimpleNamespace

    align = SimpleNamespace(steps=5, lr=1e-2, batch=6, warmup=0, clip=0.5)
    model, before = tiny_flux(), tiny_flux().state_dict()
    metrics = train_head(
        model, FLUX, align, adapt_section(), Rows(), tmp_path, scheduler=SCHEDULER, dtype="fp32", saving=Saving(0, 0.0)
    )
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"x_embedder.weight", "x_embedder.bias", "proj_out.weight", "proj_out.bias"}
    assert list(metrics["exports"]) == ["modules"]


def test_full_mode_trains_every_weight(tmp_path):
    metrics, _ = adapt(tmp_path, phase={"mode": "full", "steps": 3})
    exported, before = load_file(metrics["exports"]["modules"]), tiny_flux().state_dict()
    assert exported.keys() == before.keys()
    assert sum(not torch.equal(exported[name], before[name]) for name in before) > 0.9 * len(before)
    with pytest.raises(RecipeError, match="frozen teacher would need a second model"):
        adapt(tmp_path, phase={"mode": "full"}, adapt={"objective": "guidance-corrected", "null_branch": "teacher"})


def test_nan_names_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    rows = Rows.batch

    def poisoned(self, indices):
        z0, text = rows(self, indices)
        poison = len(losses_so_far) >= 7 and len(indices) > 1
        return (z0 * float("nan") if poison else z0), text

    losses_so_far = []
    monkeypatch.setattr(Rows, "batch", poisoned)
    with pytest.raises(CheckFailed, match=r"loss of step 7 is nan \(rows \d+, ") as caught:
        adapt(tmp_path, saving=(3, 0.0), console=Hook(losses_so_far.append))
    assert "step-000006" in caught.value.hint
    assert [path.name for path in whole(tmp_path / "checkpoints")] == ["step-000003", "step-000006"]


def test_spike_is_told_from_noise():
    curve = Curve()
    assert [curve.add(1.0 + 0.1 * (i % 5)) for i in range(30)] == [None] * 30
    assert curve.add(5.0) is None  # a bad batch
    assert curve.add(13.0) == pytest.approx(1.2)
    assert curve.losses[-1] == 5.0
    assert Curve().add(1e6) is None  # nothing to compare with yet


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_signal_finishes_the_step_saves_and_resumes(tmp_path, number, kind):
    def action(info):
        if len(steps) == 4:
            os.kill(os.getpid(), number)
        steps.append(info)

    steps, before = [], signal.getsignal(number)
    console = Hook(action)
    with pytest.raises(kind):
        adapt(tmp_path / "run", console=console)
    assert signal.getsignal(number) is before
    assert [path.name for path in whole(tmp_path / "run" / "checkpoints")] == [f"step-{len(steps):06d}"]
    assert console.said == [f"adapt (LoRA 4): stopped after step {len(steps)} of 12; a checkpoint is written"]
    adapt(tmp_path / "run")
    adapt(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_saves_by_the_clock(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(loop.Engine, "save", lambda self, folder, extra: written.append(self.step_count))
    adapt(tmp_path, saving=(0, 1e-9), phase={"steps": 3})
    assert written == [1, 2, 3]


def test_order_is_a_permutation_of_each_epoch():
    order = Order(10, 4, seed=3)
    rows = [row for step in range(5) for row in order.rows_of(step)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]
    assert Order(10, 4, seed=3).rows_of(3) == rows[12:16]  # by step alone, without the steps before
    assert [row for step in range(5) for row in Order(10, 4, seed=4).rows_of(step)] != rows


def test_curve_does_not_depend_on_the_micro_batch(tmp_path):
    adapt(tmp_path / "a")
    adapt(tmp_path / "b", phase={"micro_batch": 2})
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), abs=1e-6)


def test_curve_of_the_batched_null_prompt_is_that_of_two_passes(tmp_path):
    corrected = {"objective": "guidance-corrected"}
    adapt(tmp_path / "a", adapt=corrected, phase={"steps": 6})
    adapt(tmp_path / "b", adapt={**corrected, "null_pass": "batched"}, phase={"steps": 6})
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), abs=1e-6)


def test_no_samples_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Rows, "__len__", lambda self: 0)
    with pytest.raises(InputError, match="there are no samples"):
        adapt(tmp_path)


def test_console_null_is_enough(tmp_path):
    assert adapt(tmp_path, phase={"steps": 1}, console=NULL)[0]["steps"] == 1
