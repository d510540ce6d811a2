"""Checkpoints.

Bitwise resume, other layouts, kills at any moment, a full disk, refusals. Real processes, no mocked collectives.
"""

import random
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import CheckFailed, InputError, ResourceError
from dcgen_convert.core.files import TEMPORARY, read_json, write_json
from dcgen_convert.train import checkpoints
from dcgen_convert.train.engine import Engine

from .train_worker import adapt, engine_settings, losses, run_ranks, start_ranks, tiny_flux


def exported(folder) -> dict[str, torch.Tensor]:
    return {
        name: value
        for path in sorted(Path(folder, "export").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


class Stop(Exception):
    pass


class StoppingConsole:
    """A console whose progress bar raises after some steps: a run that dies between two checkpoints."""

    def __init__(self, after: int):
        self.after = after

    def progress(self, *args):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None

    def advance(self, *args, **info):
        self.after -= 1
        if self.after == 0:
            raise Stop

    def say(self, text):
        return None

    def scalars(self, *args):
        return None


def stop_and_resume(folder, first: dict, second: dict):
    """Save at step 4 and 8, die after step 10 of 12, continue with other options."""
    with pytest.raises(Stop):
        adapt(folder, saving=(4, 0.0), console=StoppingConsole(10), **first)
    return adapt(folder, saving=(4, 0.0), **second)[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses and export of 12 steps in one go, ZeRO 2, fp32, one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    adapt(folder)
    return losses(folder), exported(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapt": {"zero": 0}},
        {"adapt": {"zero": 1}, "phase": {"micro_batch": 3}},
        {"adapt": {"zero": 3}},
        {"adapt": {"zero": 2}, "dtype": "bf16"},
        {"adapt": {"zero": 3, "checkpointing": True}, "dtype": "bf16"},
        {"adapt": {"objective": "guidance-corrected", "null_branch": "teacher"}},
    ],
    ids=str,
)
def test_resume_is_bitwise(tmp_path, options):
    adapt(tmp_path / "whole", **options)
    metrics = stop_and_resume(tmp_path / "stopped", options, options)
    assert metrics["resumed_from"] == 8
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    whole = losses(tmp_path / "whole")
    assert metrics["loss_first"] == pytest.approx(sum(whole) / len(whole), abs=1e-6) == metrics["loss_last"]
    assert same(exported(tmp_path / "stopped"), exported(tmp_path / "whole"))


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2), (0, 1)])
def test_resume_with_another_stage(tmp_path, undisturbed, first, second):
    stop_and_resume(tmp_path, {"adapt": {"zero": first}}, {"adapt": {"zero": second}, "phase": {"micro_batch": 2}})
    reference, weights = undisturbed
    assert max(abs(a - b) for a, b in zip(losses(tmp_path), reference, strict=True)) < 1e-6
    assert distance(exported(tmp_path), weights) < 1e-5


def test_three_ranks_train_and_export_alike(tmp_path, undisturbed):
    """Three ranks do not divide the tensors evenly: every stage pads. What they saved, one process continues."""
    reference, weights = undisturbed
    folders = {zero: tmp_path / f"zero{zero}" for zero in (2, 3)}
    common = {"saving": [8, 0.0], "held": 7}  # held-out batches of 2, 2, 2 and 1 rows: two ranks have one less
    jobs = [{"folder": str(folder), "adapt": {"zero": zero}, **common} for zero, folder in folders.items()]
    assert run_ranks(3, jobs, tmp_path / "ranks.log") == [""] * 3
    alone = adapt(tmp_path / "alone", held=7, phase={"steps": 1})[0]["evaluation"]["before"]
    for folder in folders.values():
        assert read_json(folder / "evaluation-before.json") == pytest.approx(alone, rel=1e-5)
        assert max(abs(a - b) for a, b in zip(losses(folder), reference, strict=True)) < 1e-6
        assert distance(exported(folder), weights) < 1e-5
        newest = checkpoints.whole(folder / "checkpoints")[-1]
        (newest / checkpoints.INDEX).unlink()  # as if the last save had not come to its end
        metrics, _ = adapt(folder)
        assert metrics["resumed_from"] == 8
        assert max(abs(a - b) for a, b in zip(losses(folder), reference, strict=True)) < 1e-6


def test_full_tuning_is_saved_in_shards_that_any_layout_continues(tmp_path):
    """Two ranks with every weight training, in ZeRO 2 and 3: each writes its own part; one process goes on with
    another stage.
    """
    phase = {"mode": "full", "steps": 6}
    adapt(tmp_path / "one", phase=phase)
    jobs = [
        {"folder": str(tmp_path / f"zero{zero}"), "adapt": {"zero": zero}, "saving": [4, 0.0], "phase": phase}
        for zero in (2, 3)
    ]
    run_ranks(2, jobs, tmp_path / "ranks.log")
    for zero, other in ((2, 3), (3, 2)):
        folder = tmp_path / f"zero{zero}"
        newest = checkpoints.whole(folder / "checkpoints")[-1]
        files = read_json(newest / checkpoints.INDEX)["files"]
        assert sorted(files) == ["state-r000-00001.safetensors", "state-r001-00001.safetensors"]
        (small, _), (large, _) = sorted(files.values())
        assert small > 0.8 * large  # nobody writes it all
        (newest / checkpoints.INDEX).unlink()  # as if the last save had not come to its end
        metrics, _ = adapt(folder, phase=phase, adapt={"zero": other})
        assert metrics["resumed_from"] == 4
        assert max(abs(a - b) for a, b in zip(losses(folder), losses(tmp_path / "one"), strict=True)) < 1e-6
        # Ranks sum gradients in another order, and Adam turns the rounding of a gradient near zero into a step: of 6 x
        # 3e-3 here.
        assert distance(exported(folder), exported(tmp_path / "one")) < 1e-4


def test_kill_9_at_random_moments(tmp_path, undisturbed):
    """Two of three kills wait for a save to begin. The curve and the export stay those of the undisturbed run."""
    folder, log = tmp_path / "run", tmp_path / "run.log"
    jobs = [{"folder": str(folder), "saving": [1, 0.0]}]
    chance = random.Random(0)
    for inside_a_save in (True, False, True):
        (process,) = start_ranks(1, jobs, log)
        wait_for_training(process, folder)
        if inside_a_save:
            wait_until(lambda: any((folder / "checkpoints").glob(f"{TEMPORARY}*")), process)
        else:
            time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.communicate()
    run_ranks(1, jobs, log)
    reference, weights = undisturbed
    assert losses(folder) == reference
    assert distance(exported(folder), weights) == 0
    assert not list((folder / "checkpoints").glob(f"{TEMPORARY}*"))


def wait_for_training(process, folder):
    """Wait until this process has written something of its own: the metrics file is rewritten when training begins."""
    path = folder / "metrics.jsonl"
    before = path.stat().st_ino if path.exists() else None
    wait_until(lambda: path.exists() and path.stat().st_ino != before, process)


def wait_until(condition, process, seconds: float = 300):
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.0005)


def saved(folder, steps=(1, 2, 3)):
    """An engine with checkpoints of ``steps`` in ``folder``."""
    model = tiny_flux()
    engine = Engine(
        model, [(n, p) for n, p in model.named_parameters() if n.startswith("proj_out")], engine_settings(ema=0.9)
    )
    for step in steps:
        engine.step_count = step
        checkpoints.save(engine, folder, {"note": step})
    return engine


def test_two_are_kept_and_the_newest_whole_one_wins(tmp_path):
    engine = saved(tmp_path)
    assert [path.name for path in checkpoints.whole(tmp_path)] == ["step-000002", "step-000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    shard = tmp_path / "step-000003" / "state-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])  # a truncated copy, as rsync or a full disk leave them
    assert checkpoints.load(engine, tmp_path) == {"note": 2} and engine.step_count == 2
    assert checkpoints.load(engine, tmp_path / "nothing") is None
    engine.close()


def test_shards_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 1000)
    engine = saved(tmp_path, steps=(5,))
    files = read_json(tmp_path / "step-000005" / checkpoints.INDEX)["files"]
    assert len(files) > 2
    before = dict(engine.tensors("ema"))
    checkpoints.load(engine, tmp_path)
    assert same(before, engine.ema)
    engine.close()


def test_full_disk_is_one_sentence_and_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    engine = saved(tmp_path, steps=(1,))

    def no_space(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "atomic_save", no_space)
    engine.step_count = 2
    with pytest.raises(ResourceError, match="step 2 could not be written to .*: No space left on device"):
        checkpoints.save(engine, tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoints.load(engine, tmp_path) == {"note": 1}
    engine.close()


def test_foreign_and_broken_checkpoints_are_refused(tmp_path):
    saved(tmp_path / "a").close()
    model = tiny_flux()
    other = Engine(
        model, [(n, p) for n, p in model.named_parameters() if n.startswith("x_embedder")], engine_settings(ema=0.9)
    )
    with pytest.raises(InputError, match="trains other tensors .param/.* differs"):
        checkpoints.load(other, tmp_path / "a")
    other.close()
    engine = saved(tmp_path / "b", steps=())
    next(iter(engine.named.values())).data.fill_(float("nan"))
    engine.state.write(engine.named["proj_out.bias"], "param", torch.full((8,), float("nan")))
    engine.step_count = 1
    checkpoints.save(engine, tmp_path / "b", {})
    with pytest.raises(CheckFailed, match="proj_out.bias holds values that are not finite"):
        checkpoints.load(engine, tmp_path / "b")
    engine.close()


def test_other_settings_do_not_continue_a_run(tmp_path):
    adapt(tmp_path, phase={"steps": 2})
    with pytest.raises(InputError, match=r"written with other settings: adapt\.text_drop, phase\.alpha$"):
        adapt(tmp_path, phase={"steps": 2, "alpha": 1.0}, adapt={"text_drop": 0.5})
    path = tmp_path / "checkpoints" / "step-000002" / checkpoints.INDEX
    assert read_json(path)["extra"]["identity"]["rows"] == 100
    write_json(path, {**read_json(path), "schema": "dcgen.checkpoint/0"})
    with pytest.raises(InputError, match="its schema differs"):
        adapt(tmp_path, phase={"steps": 2})


def test_a_damaged_newest_checkpoint_is_told_and_a_single_one_is_refused(tmp_path, capsys):
    adapt(tmp_path, phase={"steps": 4}, saving=(2, 0.0))
    first, second = checkpoints.whole(tmp_path / "checkpoints")
    index = second / checkpoints.INDEX
    index.write_text(index.read_text()[:-40])
    metrics, _ = adapt(tmp_path, phase={"steps": 4}, console=Console("human", stderr=sys.stdout))
    assert metrics["resumed_from"] == 2
    said = " ".join(capsys.readouterr().out.split())
    assert f"{second} is damaged: the checkpoint before it is used" in said
    for path in (first, second):
        (path / checkpoints.INDEX).write_text("{")
    with pytest.raises(CheckFailed, match="step-000004 is damaged, and there is no other"):
        adapt(tmp_path, phase={"steps": 4})
