"""Stages 2 and 3 end to end on the tiny model."""

import json
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from dcgen_convert import families
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import CheckFailed, InputError, RecipeError, Terminated
from dcgen_convert.recipe.schema import AlignHead, Phase
from dcgen_convert.train import loop, lora
from dcgen_convert.train.checkpoints import whole
from dcgen_convert.train.loop import Curve, Place, Saving
from dcgen_convert.train.phases import Task, adapt_phase, train_head
from dcgen_convert.train.watch import Intervals

from .train_worker import FLUX, SCHEDULER, Rows, adapt, adapt_section, losses, phase_section, tiny_flux


class Hook:
    """A console whose progress bar calls a function after every step."""

    def __init__(self, action):
        self.action, self.said, self.scalar = action, [], []

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

    def scalars(self, *args):
        self.scalar.append(args)


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
    assert len(seen) == 60
    assert set(seen[0]) == {
        "loss",
        "grad_norm",
        "lr",
        "samples_per_s",
        "tokens_per_s",
        "memory_gib",
    }  # no MFU without a GPU
    assert seen[0]["tokens_per_s"] == pytest.approx(seen[0]["samples_per_s"] * (16 + 3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    known = {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "seconds",
        "samples_per_second",
        "tokens_per_s",
        "memory_gib",
        "data_wait_seconds",
    }
    assert set(lines[0]) == known and len(lines) == 60
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
    assert second["loss_first"] == first["loss_first"] and second["loss_last"] == first["loss_last"]  # of the whole run
    assert load_file(first["exports"]["lora"]).keys() == load_file(second["exports"]["lora"]).keys()


def train_tiny_head(folder, micro_batch, **shared):
    align = AlignHead(steps=5, lr=1e-2, batch=6, warmup=0, clip=0.5)
    model = tiny_flux()
    task = Task(model, FLUX, adapt_section(**shared), Rows(), SCHEDULER)
    return train_head(task, align, "fp32", micro_batch, Place(folder, saving=Saving(0, 0.0))), model


def test_head_stage_trains_embedder_and_head_only(tmp_path):
    metrics, model = train_tiny_head(tmp_path, 6)
    before = tiny_flux().state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"x_embedder.weight", "x_embedder.bias", "proj_out.weight", "proj_out.bias"}
    assert list(metrics["exports"]) == ["modules"]


@pytest.mark.parametrize("objective", ["flow", "guidance-corrected"])
def test_the_trained_head_does_not_depend_on_the_micro_batch(objective, tmp_path):
    """Six samples at once or two at a time: the same weights, but for the order of summation."""
    exports = [
        load_file(train_tiny_head(tmp_path / str(size), size, objective=objective)[0]["exports"]["modules"])
        for size in (6, 2)
    ]
    for name, value in exports[0].items():
        torch.testing.assert_close(exports[1][name], value, rtol=1e-5, atol=1e-6)
    assert len(losses(tmp_path / "6")) == len(losses(tmp_path / "2")) == 5


def test_full_mode_trains_every_weight(tmp_path):
    metrics, _ = adapt(tmp_path, phase={"mode": "full", "steps": 3})
    exported, before = load_file(metrics["exports"]["modules"]), tiny_flux().state_dict()
    assert exported.keys() == before.keys()
    assert sum(not torch.equal(exported[name], before[name]) for name in before) > 0.9 * len(before)
    with pytest.raises(RecipeError, match="frozen teacher would need a second model"):
        adapt(tmp_path, phase={"mode": "full"}, adapt={"objective": "guidance-corrected", "null_branch": "teacher"})


def test_a_consistency_phase_moves_the_first_guess_towards_the_end_of_the_teachers_steps(tmp_path):
    """What the phase starts from is the teacher: 20 of its Euler steps against one guess of the student's, from
    noise alone.
    """
    generator = torch.Generator().manual_seed(3)
    rows, noise, g = Rows(8, seed=1), torch.randn(8, 8, 4, 4, generator=generator), torch.full((8,), 3.0)
    _, text = rows.batch(range(8))

    def guess(model, steps):
        z = noise
        with torch.no_grad():
            for level in torch.linspace(1, 0, steps + 1)[:-1]:
                z = z - FLUX.velocity(model, z, level.expand(8), text, g) / steps
        return z

    settings = {"steps": 60, "batch": 16, "micro_batch": 16, "lr": 1e-2, "consistency": 0.8}
    metrics, _ = adapt(tmp_path, phase=settings, adapt={"ema": 0.9, "text_drop": 0.0}, held_out=rows)
    teacher, student = tiny_flux(), tiny_flux()
    lora.add_lora(student, FLUX.lora_targets, 4, 8.0, seed=0)
    exports = {**load_file(metrics["exports"]["modules"]), **load_file(metrics["exports"]["lora"])}
    place = {f"transformer.{name.replace('.default.', '.')}": name for name in student.state_dict()}
    student.load_state_dict({place.get(name, name): value for name, value in exports.items()}, strict=False)
    goal = guess(teacher, 20)
    before, after = ((guess(model, 1) - goal).square().mean() for model in (teacher, student))
    assert after < 0.8 * before
    assert metrics["evaluation"]["after"]["mean"] < metrics["evaluation"]["before"]["mean"]


def test_consistency_needs_a_frozen_teacher_and_a_guess_in_full_noise(tmp_path):
    with pytest.raises(ValueError, match="consistency needs mode lora"):
        Phase(mode="full", resolution=64, steps=1, consistency=0.9)
    dit = families.get("dit")
    with pytest.raises(RecipeError, match="predicts epsilon"):
        task = Task(None, dit, adapt_section(), Rows(), {})
        adapt_phase(task, phase_section(consistency=0.9), "fp32", Place(tmp_path))


def test_partitioned_weights_have_the_same_frozen_teacher(tmp_path):
    for zero in (2, 3):
        adapt(tmp_path / str(zero), phase={"steps": 6, "consistency": 0.8}, adapt={"zero": zero})
    two, three = (losses(tmp_path / str(zero)) for zero in (2, 3))
    assert two == pytest.approx(three, rel=1e-5) and max(two) > min(two) > 0


def test_nan_names_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    rows = Rows.batch

    def poisoned(self, indices):
        z0, text = rows(self, indices)
        batches.extend([indices] if len(indices) > 1 else [])  # one a step; single rows are read for their shape
        return (z0 * float("nan") if len(batches) > 7 else z0), text

    batches = []
    monkeypatch.setattr(Rows, "batch", poisoned)
    with pytest.raises(CheckFailed, match=r"loss of step 7 is nan \(rows \d+, ") as caught:
        adapt(tmp_path, saving=(3, 0.0))
    assert "step-000006" in caught.value.hint
    assert ", ".join(map(str, batches[7])) in caught.value.message
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
    monkeypatch.setattr(loop, "save", lambda engine, folder, extra: written.append(engine.step_count))
    adapt(tmp_path, saving=(0, 1e-9), phase={"steps": 3})
    assert written == [1, 2, 3]


def test_curve_does_not_depend_on_the_micro_batch(tmp_path):
    adapt(tmp_path / "a")
    adapt(tmp_path / "b", phase={"micro_batch": 2})
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), abs=1e-6)


def test_no_samples_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Rows, "__len__", lambda self: 0)
    with pytest.raises(InputError, match="there are no samples"):
        adapt(tmp_path)


def test_the_next_batch_is_read_while_this_one_is_trained_on(tmp_path, monkeypatch):
    """No step ends before the batch of the next one is there: without reading ahead, the wait would be in vain."""
    rows, read, late = Rows.batch, threading.Semaphore(0), []

    def batch(self, indices):
        found = rows(self, indices)
        if len(indices) > 1:
            read.release()
        return found

    def step(self, loss_of, batches, stop=False):
        def waiting(positions):
            loss = loss_of(positions)
            # the first step waits for its own batch too: from then on one batch is read before the step that needs it
            waits = {0: 2, self.settings.steps - 1: 0}.get(self.step_count, 1)
            late.extend(self.step_count for _ in range(waits) if not read.acquire(timeout=300))
            return loss

        return take_step(self, waiting, batches, stop)

    take_step = loop.Engine.step
    monkeypatch.setattr(Rows, "batch", batch)
    monkeypatch.setattr(loop.Engine, "step", step)
    metrics, _ = adapt(tmp_path, phase={"steps": 4})
    assert not late and metrics["steps"] == 4 and not read.acquire(blocking=False)


def test_an_error_of_the_reader_reaches_the_run(tmp_path, monkeypatch):
    def broken(self, indices):
        if len(indices) > 1:
            raise InputError("the shard is gone")
        return rows(self, indices)

    rows = Rows.batch
    monkeypatch.setattr(Rows, "batch", broken)
    with pytest.raises(InputError, match="the shard is gone"):
        adapt(tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_looks_on_the_way_change_nothing_and_follow_the_checkpoint(tmp_path):
    """Held-out losses every 4 steps, a drawing every 5, of the averaged weights; the curve is that of a run without."""

    def draw(velocity, step):
        saved = [path.name for path in whole(tmp_path / "looked" / "checkpoints")]
        z = torch.zeros(2, 8, 4, 4)
        text = {key: value[:2] for key, value in Rows(2).text.items()}
        with torch.no_grad():
            drawn.append((step, saved[-1], velocity(z, torch.full((2,), 0.5), text, torch.ones(2)).shape))

    drawn, console = [], Hook(lambda info: None)
    adapt(tmp_path / "looked", held_out=Rows(4, seed=1), intervals=Intervals(4, 5, draw), console=console)
    adapt(tmp_path / "plain", held_out=Rows(4, seed=1))
    assert losses(tmp_path / "looked") == losses(tmp_path / "plain")
    assert drawn == [(5, "step-000005", (2, 8, 4, 4)), (10, "step-000010", (2, 8, 4, 4))]
    lines = [json.loads(line) for line in (tmp_path / "looked" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert len(set(lines[0]) - {"step", "mean"}) == 5
    values = [dict(values) for label, step, values in console.scalar if step == 3]
    assert len(values) == 2 and "held_out_mean" in values[1] and "tokens_per_s" in values[0]


def test_the_last_look_is_the_evaluation_after(tmp_path):
    metrics, _ = adapt(tmp_path, phase={"steps": 4}, held_out=Rows(4, seed=1), intervals=Intervals(evaluate=4))
    line = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert {key: line[key] for key in metrics["evaluation"]["after"]} == metrics["evaluation"]["after"]


def test_console_null_is_enough(tmp_path):
    assert adapt(tmp_path, phase={"steps": 1}, console=NULL)[0]["steps"] == 1
