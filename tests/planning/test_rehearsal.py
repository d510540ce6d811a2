"""What a rehearsal leaves out, what it measures, and what a plan makes of it."""

import json
from dataclasses import replace

import pytest
from conftest import run_cli

from dcgen_convert.core import clock
from dcgen_convert.core.errors import InputError
from dcgen_convert.planning import bill, plan, rehearsal, stage_memory
from dcgen_convert.planning.fit import decide
from dcgen_convert.planning.memory import GIB
from dcgen_convert.planning.rates import CPUS, H100
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.recipe import loading

LITTLE = ("--set", "align_head.draws=1", "--set", "watch.pictures=2")


def made(name: str, ranks: int = 1, gib: float = 79.1, device=H100, sets=(), **asked):
    """(real recipe, that of its rehearsal, what is said of it)."""
    resolved = loading.load(name, sets=sets)
    sizes = shapes_of(resolved.recipe, resolved.identity)

    def micro_batch(phase):
        return decide(resolved.recipe, phase, sizes, ranks, gib * GIB).micro_batch

    return resolved.recipe, *rehearsal.small(resolved.recipe, sizes, ranks, device, micro_batch, **asked)


def test_work_within_work_counts_once_and_the_first_piece_apart(monkeypatch):
    now = iter([0, 10, 13, 20, 30, 31, 40, 44])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(now)))
    with clock.measuring(lambda: None) as found:
        clock.begin("data")
        with clock.timed("draw", 4), clock.timed("write"):  # 0 to 20, of which writing 10 to 13
            pass
        with (
            clock.timed("draw", lambda: 2),
            clock.renamed({"write": "keep"}),
            clock.timed("write"),
        ):  # 30 to 44, 31 to 40
            pass
    assert found.figures() == {
        "data": {
            "write": {"count": 1, "seconds_each": 3},
            "draw": {"count": 6, "seconds_each": 2.5},  # the second piece: 14 s without 9 s, for 2
            "keep": {"count": 1, "seconds_each": 9},
        }
    }
    with clock.timed("draw"):  # no rehearsal: nothing asks for the time
        pass


def test_work_that_fails_does_not_disturb_what_follows():
    with clock.measuring(lambda: None) as found:
        with pytest.raises(ValueError, match="wrong"), clock.timed("outer"), clock.timed("inner"):
            raise ValueError("wrong")
        with clock.timed("later"):
            pass
    assert found.figures() == {"start": {"later": found.figures()["start"]["later"]}} and not found.inner


@pytest.mark.parametrize("name, ranks, device", [("flux-krea", 8, H100), ("tiny-flux", 1, CPUS)])
def test_where_a_step_is_short_all_is_done_at_the_size_of_the_real_run(name, ranks, device):
    """On H100s the full batches; there memory is that of the real run."""
    recipe, small, told = made(name, ranks, device=device)
    assert small.data.count >= recipe.data.batch * ranks or small.data.count == recipe.data.count
    for phase, real in zip(small.adapt.phases, recipe.adapt.phases, strict=True):
        assert (phase.resolution, phase.rank, phase.mode) == (real.resolution, real.rank, real.mode)
        assert 2 <= phase.steps <= 12 and phase.batch == real.batch
    assert small.data.steps == small.bundle.steps == small.quantize.calibration.steps == 2
    assert any("drawing steps" in line for line in told)


def test_where_a_step_is_long_little_is_done():
    """On two CPU cores SANA draws two pictures, and trains on one of 1024 px at once."""
    _, small, _ = made("sana-1.6b", gib=20, device=CPUS, sets=["align_head.steps=100"])
    assert small.data.count == 2 and [phase.batch for phase in small.adapt.phases] == [3, 1]
    assert [phase.steps for phase in small.adapt.phases] == [2, 2] and small.align_head.batch == 3
    assert [phase.resolution for phase in small.adapt.phases] == [512, 1024]


def test_the_user_may_say_how_much():
    _, small, _ = made("tiny-flux", pictures=6, steps=3, sets=["align_head.steps=100"])
    assert small.data.count == 6 and small.data.steps == small.adapt.phases[0].steps == small.align_head.steps == 3


def test_another_number_of_pictures_is_the_same_conversion():
    sets = ["data.kind=folder", "data.path=.", "adapt.phases.1.data.count=9"]
    some = loading.load("flux-krea-4k", sets=sets[:2]).recipe
    fewer = loading.load("flux-krea-4k", sets=sets).recipe
    other = loading.load("flux-krea-4k", sets=[*sets, "adapt.phases.1.data.min_side=2048"]).recipe
    assert rehearsal.conversion_of(some) == rehearsal.conversion_of(fewer) != rehearsal.conversion_of(other)


def test_what_is_measured_takes_the_place_of_what_is_fixed_and_of_the_rates():
    resolved = loading.load("flux-krea")
    sizes = shapes_of(resolved.recipe, resolved.identity)
    stages = {"data": bill.Measured({"draw": 0.25}, rest=36.0)}
    found = bill.bill(resolved.recipe, sizes, 2, rehearsal.Rehearsal(stages, {}, {}, CPUS, 2, False, 1e10))
    data = next(row for row in found["stages"] if row["stage"] == "data")
    parts = {part["what"]: part for part in data["work"]}
    assert parts["draw"]["basis"] == "measured" and parts["decode"]["basis"] == "assumed"
    assert parts["draw"]["wall_hours"] == pytest.approx(100_000 * 20 * 0.25 / 2 / 3600)
    assert parts["draw"]["wall_hours_low"] == parts["draw"]["wall_hours_high"] == parts["draw"]["wall_hours"]
    assert parts["the rest"]["wall_hours"] == pytest.approx(0.01) and "load" not in parts
    assert found["basis"].startswith("2 of ")


def test_memory_that_was_measured_grows_with_the_pictures_at_once():
    need = stage_memory.Need("data", weights=10 * GIB, each=GIB, at_once=8)
    then = replace(need, at_once=2)
    measured = stage_memory.Peaks({"data": {"host": 3 * GIB, "gpu": 14 * GIB}}, {"data": then})
    row = stage_memory.rows([need], True, measured)[0]
    assert row["basis"] == "measured" and row["gpu_gib"] == pytest.approx(14 + 6 * 1.08, abs=0.01)
    assert row["host_gib"] == 3
    assert stage_memory.rows([need], True)[0]["basis"] == "counted"


def test_a_gpu_that_cannot_hold_the_pipeline_is_refused():
    resolved = loading.load("flux-krea")
    document = plan.plan(resolved, gpu_bytes=24 * GIB)
    assert document["exit_code"] == 4
    assert any("stage data needs" in problem for problem in document["problems"])
    assert not plan.plan(resolved)["problems"]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A folder with the rehearsal of tiny-dit in `r`, and its printed document."""
    folder = tmp_path_factory.mktemp("rehearsed")
    done = run_cli(
        "rehearse", "tiny-dit", "--ae", "tiny-dc-ae-f32", *LITTLE, "--pictures", "4", "--steps", "2", "--run-dir", "r",
        "--json", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_a_rehearsal_measures_every_kind_of_work(rehearsed):
    """So that a plan from its file has no assumed rate, and no stage is missing."""
    folder, document = rehearsed
    assert document["schema"] == "dcgen.rehearsal/1" and document["status"] == "done"
    assert json.loads((folder / "r" / "rehearsal.json").read_text()) == document
    parts = [(row["stage"], part) for row in document["time"]["stages"] for part in row["work"]]
    assert [(stage, part["what"]) for stage, part in parts if part["basis"] != "measured"] == []
    stages = [row["stage"] for row in document["stages"]]
    assert stages[0] == "start" and stages[-1] == "verify" and len(stages) == 10
    assert (folder / "r" / "output" / "model_index.json").exists()
    for row in document["stages"][1:]:
        counted = sum(kind["count"] * kind["seconds_each"] for kind in row["work"].values())
        assert 0 <= row["rest"] <= row["seconds"] <= row["rest"] + counted + 0.01
        assert 0.1 * GIB < row["peak"]["host"] < 4 * GIB


def test_a_plan_of_another_size_reads_the_file(rehearsed):
    folder, document = rehearsed
    args = ("plan", "tiny-dit", "--ae", "tiny-dc-ae-f32", *LITTLE, "--disk", "2000", "--measured", "r/rehearsal.json")
    done = run_cli(*args, "--set", "data.count=1000", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    draw = next(part for row in found["time"]["stages"] for part in row["work"] if part["what"] == "draw")
    each = next(row for row in document["stages"] if row["stage"] == "data")["work"]["draw"]["seconds_each"]
    assert draw["wall_hours"] == pytest.approx(each * draw["count"] / 3600) and draw["count"] == 1000 * 20
    assert {row["basis"] for row in found["memory"]["stages"]} == {"measured"}
    other = run_cli(*args, "--set", "adapt.phases.0.rank=8", cwd=folder)
    assert other.returncode == 2 and "adapt.phases.0.rank" in other.stderr


@pytest.mark.parametrize(
    "change, said",
    [
        ({"schema": "dcgen.plan/2"}, "is no rehearsal"),
        ({"status": "running"}, "has not ended"),
        ({"stages": [{"stage": "data"}]}, "is damaged"),
        ({"memory": "much"}, "is damaged"),
        ({"memory": -1}, "is damaged"),
    ],
)
def test_a_file_that_is_no_finished_rehearsal_is_refused(rehearsed, tmp_path, change, said):
    file = tmp_path / "rehearsal.json"
    file.write_text(json.dumps({**rehearsed[1], **change}))
    with pytest.raises(InputError, match=said):
        rehearsal.read(file, loading.load("tiny-dit").recipe)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("kept")
    done = run_cli("rehearse", "tiny-dit", "--ae", "tiny-dc-ae-f32", "--run-dir", "r", cwd=tmp_path)
    assert done.returncode == 2 and "no rehearsal" in done.stderr
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["mine.txt"]
