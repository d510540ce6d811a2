"""What a run has made survives changes: it is kept, added to or gone on with; nothing much is deleted unasked."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import SHORT
from safetensors.torch import load_file
from stopping import Stopping

from dcgen_convert.checkpoint.source import Source
from dcgen_convert.conversion import convert
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import CheckFailed, InputError, Terminated
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.core.journal import SEAL, fingerprint
from dcgen_convert.data.images import to_image
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import align_head, bundle, source_pipeline

STEPS, STOP, PICTURES = 12, 5, 24
SETTINGS = {**SHORT, "data.count": PICTURES, "evaluate.prompts": 0, "align_head.steps": 0, "bundle.steps": 1}
SETTINGS |= {"adapt.phases.0.steps": STEPS, "adapt.phases.0.batch": 8, "adapt.phases.0.warmup": 2}
SETTINGS |= {"adapt.phases.0.schedule": "constant", "quantize.format": "none", "latents.scale_tolerance": 100}


def job(folder, *changes, **settings):
    """A conversion of the pictures in ``folder``/pictures."""
    values = {**SETTINGS, "data.kind": "folder", "data.path": folder / "pictures", **settings}
    return load("tiny-flux", sets=[*(f"{key}={value}" for key, value in values.items()), *changes])


def draw(folder, numbers):
    folder.mkdir(exist_ok=True)
    for number in numbers:
        pixels = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(number)).repeat_interleave(32, 1)
        to_image(pixels.repeat_interleave(32, 2) * 2 - 1).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"a small red circle, number {number}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """pictures; whole/: a run up to merge-1; stopped/: the same, stopped in its training."""
    folder = tmp_path_factory.mktemp("survives")
    draw(folder / "pictures", range(PICTURES))
    convert(job(folder), folder / "whole", folder / "out", NULL, until="align-head")
    shutil.copytree(folder / "whole", folder / "stopped")
    with pytest.raises(Terminated):
        convert(job(folder), folder / "stopped", folder / "out", Stopping(STOP), until="adapt-1")
    convert(job(folder), folder / "whole", folder / "out", NULL, until="merge-1")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of everything that a test may spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def go_on(folder, run, *changes, until="adapt-1", **settings):
    """Continue a run; what was said."""
    console = Console("human", stderr=open(folder / "said.txt", "w"))  # noqa: SIM115  closed with the process
    convert(job(folder, *changes, **settings), folder / run, folder / "out", console, until=until)
    return " ".join((folder / "said.txt").read_text().split())


def record(folder, run, stage="adapt-1"):
    return read_json(folder / run / stage / "stage.json")


def losses(folder, run):
    return [json.loads(line)["loss"] for line in (folder / run / "adapt-1" / "metrics.jsonl").read_text().splitlines()]


def touched(folder):
    for path in (folder / "pictures").iterdir():
        os.utime(path)


def noted(folder):
    (folder / "pictures" / "README.md").write_text("where they come from")


def moved(folder):
    (folder / "pictures").rename(folder / "elsewhere")


@pytest.mark.parametrize("habit", [touched, noted, moved])
def test_habits_change_nothing(copy, habit):
    habit(copy)
    where = {"data.path": copy / "elsewhere"} if habit is moved else {}
    assert go_on(copy, "whole", until="merge-1", **where).count("holds, skipped") == 7
    assert record(copy, "stopped", "latents") == record(copy, "whole", "latents")
    go_on(copy, "stopped", **where)
    assert record(copy, "stopped")["metrics"]["resumed_from"] == STOP and losses(copy, "stopped") == losses(
        copy, "whole"
    )


def test_one_changed_byte_of_a_picture_counts_whatever_its_time_stamp_says(copy):
    picture = copy / "pictures" / "003.png"
    before, content = os.stat(picture), bytearray(picture.read_bytes())
    to_image(torch.zeros(3, 128, 128)).save(copy / "other.png")
    picture.write_bytes((copy / "other.png").read_bytes())
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))
    said = go_on(copy, "whole", until="latents")
    assert "data: starts again, changed: the contents of data.path" in said and "latents: starts again" in said
    assert picture.read_bytes() != content


def test_more_pictures_are_appended_and_everything_finished_holds(copy):
    before = load_file(copy / "whole" / "latents" / "target-128-00000.safetensors")["z"]
    held = read_json(copy / "whole" / "latents" / "index.json")["held_out"]
    draw(copy / "pictures", range(PICTURES, PICTURES + 20))
    draw(copy / "new first", [60])
    for suffix in ("png", "txt"):  # a name that comes before the others
        (copy / "new first" / f"060.{suffix}").rename(copy / "pictures" / f"000-a.{suffix}")
    said = go_on(copy, "whole", until="merge-1", **{"data.count": 100})
    assert "latents: continues, 21 new pictures are appended to 24" in said
    assert said.count("holds, skipped") == 5 and "align-head: holds, skipped; latents has grown since" in said
    after = load_file(copy / "whole" / "latents" / "target-128-00000.safetensors")["z"]
    assert torch.equal(after[:PICTURES], before) and len(after) == 32
    index = read_json(copy / "whole" / "latents" / "index.json")
    assert index["count"] == PICTURES + 21 and index["held_out"][: len(held)] == held
    go_on(copy, "fresh", until="latents", **{"data.count": 100})
    named = {}
    for run in ("whole", "fresh"):
        rows = [json.loads(line)["file"] for line in (copy / run / "latents" / "rows.jsonl").read_text().splitlines()]
        shards = sorted((copy / run / "latents").glob("target-128-*"))
        named[run] = dict(zip(rows, torch.cat([load_file(path)["z"] for path in shards]), strict=True))
        texts = torch.cat(
            [load_file(path)["pooled_projections"] for path in sorted((copy / run / "latents").glob("text-*"))]
        )
        named[f"{run} texts"] = dict(zip(rows, texts, strict=True))
    for kind in ("", " texts"):
        assert named[f"whole{kind}"].keys() == named[f"fresh{kind}"].keys()
        for name, row in named[f"whole{kind}"].items():
            torch.testing.assert_close(row, named[f"fresh{kind}"][name], rtol=1e-4, atol=1e-5)


def test_an_unfinished_training_goes_on_with_the_new_pictures(copy):
    draw(copy / "pictures", range(PICTURES, PICTURES + 8))
    go_on(copy, "stopped", **{"data.count": 100})
    metrics = record(copy, "stopped")["metrics"]
    assert metrics["resumed_from"] == STOP and metrics["steps"] == STEPS
    held = len(read_json(copy / "stopped" / "latents" / "index.json")["held_out"])
    assert metrics["history"] == [f"from step {STOP} on: rows {PICTURES - 1} -> {PICTURES + 8 - held}"]


def test_a_longer_phase_at_a_constant_rate_is_one_longer_run_to_the_bit(copy):
    longer = {"adapt.phases.0.steps": STEPS + 6}
    said = go_on(copy, "whole", **longer)
    assert f"adapt-1: continues, from step {STEPS} on: adapt.phases.0.steps {STEPS} -> {STEPS + 6}" in said
    shutil.rmtree(copy / "stopped" / "adapt-1")
    go_on(copy, "stopped", **longer)
    assert losses(copy, "whole") == losses(copy, "stopped") and len(losses(copy, "whole")) == STEPS + 6
    files = [path.name for path in (copy / "whole" / "adapt-1" / "export").iterdir()]
    for name in files:
        one, other = (load_file(copy / run / "adapt-1" / "export" / name) for run in ("whole", "stopped"))
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_a_stopped_training_of_the_head_does_not_fit_its_start_again(copy, monkeypatch):
    settings = {"align_head.steps": 6, "align_head.warmup": 1}
    with pytest.raises(Terminated):
        convert(job(copy, **settings), copy / "stopped", copy / "out", Stopping(3, "align"), until="align-head")
    monkeypatch.setattr(align_head, "start_head", lambda *_: pytest.fail("it was fitted again"))
    go_on(copy, "stopped", until="align-head", **settings)
    monkeypatch.undo()
    shutil.rmtree(copy / "whole" / "align-head")
    go_on(copy, "whole", until="align-head", **settings)
    found, wanted = (record(copy, run, "align-head") for run in ("stopped", "whole"))
    assert found["metrics"]["loss_start"] == wanted["metrics"]["loss_start"]
    assert (found["result"], found["outputs"]["start.safetensors"]) == (
        wanted["result"],
        wanted["outputs"]["start.safetensors"],
    )


@pytest.mark.parametrize("change", ["adapt.phases.0.lr=0.0001", "adapt.clip=0.01"])
def test_a_lower_rate_or_clip_goes_on_and_is_recorded(copy, change):
    name = change.partition("=")[0].replace("adapt.phases.0", "phase")
    said = go_on(copy, "stopped", change)
    metrics = record(copy, "stopped")["metrics"]
    assert f"adapt-1: continues, from step {STOP} on: {change.partition('=')[0]} " in said
    assert metrics["resumed_from"] == STOP and f"{name} " in metrics["history"][0]
    assert losses(copy, "stopped")[:STOP] == losses(copy, "whole")[:STOP]
    assert losses(copy, "stopped")[-1] != losses(copy, "whole")[-1]


def spend(folder, run, stage, seconds):
    """Let a finished stage have taken so long."""
    path = folder / run / stage / "stage.json"
    write_json(path, {**read_json(path), "seconds": seconds})


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage, change", [("data", "data.count=7"), ("adapt-1", "adapt.phases.0.batch=4")])
def test_much_work_is_deleted_only_when_the_user_says_so(copy, stage, change):
    spend(copy, "whole", "adapt-1", 7200.0)
    before = everything(copy / "whole" / "adapt-1")
    with pytest.raises(
        InputError, match=r"2 h 00 min of work would be deleted \(.*adapt-1 2 h 00 min.*changed: "
    ) as caught:
        go_on(copy, "whole", change, until="merge-1")
    assert "--from " in caught.value.hint and everything(copy / "whole" / "adapt-1") == before
    asked = []

    def refuse(text):
        asked.append(text)
        return False

    with pytest.raises(InputError):
        convert(job(copy, change), copy / "whole", copy / "out", NULL, until="merge-1", consent=refuse)
    assert len(asked) == 1
    convert(job(copy, change), copy / "whole", copy / "out", NULL, start=stage, until="adapt-1")
    assert everything(copy / "whole" / "adapt-1") != before


def test_what_from_asked_for_begins_once_and_then_continues(copy):
    with pytest.raises(Terminated):
        convert(job(copy), copy / "whole", copy / "out", Stopping(STOP), start="adapt-1", until="merge-1")
    go_on(copy, "whole", until="merge-1")
    assert record(copy, "whole")["metrics"]["resumed_from"] == STOP


def test_an_unfinished_stage_counts(copy):
    path = copy / "stopped" / "adapt-1" / "started.json"
    write_json(path, {**read_json(path), "spent": 3600.0})
    with pytest.raises(InputError, match=r"1 h 0\d min of work would be deleted \(adapt-1"):
        go_on(copy, "stopped", "adapt.phases.0.rank=4")


def test_a_stage_that_comes_out_equal_does_not_run_the_others_again(copy):
    (copy / "whole" / "surgery" / "transformer" / "config.json").unlink()
    said = go_on(copy, "whole", until="merge-1")
    assert "surgery: runs again, transformer/config.json is missing" in said
    assert said.count("holds, skipped") == 6


def flip(path):
    """Change one bit, in the middle of the data, and keep the time stamp."""
    stamp, content = os.stat(path), bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 16
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


FINISHED = [
    "surgery/transformer/diffusion_pytorch_model.safetensors",
    "data/index.jsonl",
    "latents/target-128-00000.safetensors",
    "latents/base-128-00000.safetensors",
    "latents/text-00000.safetensors",
    "latents/null-00000.safetensors",
    "latents/captions.safetensors",
    "latents/index.json",
    "latents/rows.jsonl",
    "align-embedder/modules.safetensors",
    "align-head/modules.safetensors",
    "adapt-1/export/modules.safetensors",
    "adapt-1/export/pytorch_lora_weights.safetensors",
    "merge-1/transformer/diffusion_pytorch_model.safetensors",
    "merge-1/transformer/config.json",
]


def test_one_changed_bit_in_any_finished_artefact_is_noticed_and_mended(copy):
    wanted = {name: (copy / "whole" / name).read_bytes() for name in FINISHED}
    for name in FINISHED:
        flip(copy / "whole" / name)
    said = go_on(copy, "whole", until="merge-1")
    for name in FINISHED:
        assert f"{copy / 'whole' / name} is not what the stage wrote" in said.replace("- ", "-") or name in said, name
    differ = [name for name in FINISHED if (copy / "whole" / name).read_bytes() != wanted[name]]
    assert differ == []
    assert record(copy, "whole")["metrics"]["resumed_from"] == STEPS  # the training itself was not done again


def test_a_damaged_checkpoint_is_named_with_the_cure(copy):
    state = next((copy / "stopped" / "adapt-1" / "checkpoints").glob("*/state-*"))
    flip(state)
    with pytest.raises(CheckFailed, match=r"state-00001\.safetensors is damaged") as caught:
        go_on(copy, "stopped")
    assert f"delete {state.parent}" in caught.value.hint


def test_a_damaged_shard_of_unfinished_latents_is_made_again(copy):
    run = copy / "whole" / "latents"
    wanted = (run / "target-128-00000.safetensors").read_bytes()
    marker = read_json(run / "stage.json")
    started = {"inputs": marker["inputs"], "history": [], "origin": None}
    write_json(run / "started.json", {**started, "begun": 0, "spent": 0, SEAL: fingerprint(started)})
    (run / "stage.json").unlink()
    flip(run / "target-128-00000.safetensors")
    said = go_on(copy, "whole", until="latents")
    assert "target-128-00000.safetensors is damaged: it is made again" in said.replace("- ", "-")
    assert (run / "target-128-00000.safetensors").read_bytes() == wanted


def test_a_finished_bundle_is_replaced_only_with_force(copy):
    convert(job(copy), copy / "whole", copy / "out", NULL, until="bundle")
    before = everything(copy / "out")
    convert(job(copy), copy / "whole", copy / "out", NULL, until="bundle")  # it holds
    for other in (copy / "whole", copy / "another run"):
        with pytest.raises(InputError, match="is not empty") as caught:
            convert(job(copy, "seed=1"), other, copy / "out", NULL, until="bundle")
        assert "--force" in caught.value.hint and everything(copy / "out") == before
    assert SEAL in record(copy, "whole", "bundle") and Path(sys.executable).exists()


def test_a_run_that_keeps_little_holds_and_makes_again_only_what_is_asked_for(copy, monkeypatch):
    """With keep=bundle latents, checkpoints and layers go when the last stage that reads them is done."""
    whole = copy / "whole"
    assert go_on(copy, "whole", "keep=bundle", until="merge-1").count("holds, skipped") == 7
    left = {path.relative_to(whole).as_posix() for path in whole.rglob("*.safetensors")}
    assert left == {"merge-1/transformer/diffusion_pytorch_model.safetensors"}
    said = go_on(copy, "whole", "keep=bundle", until="merge-1")
    assert said.count("holds, skipped; clean has removed files of it") == 5 and said.count("holds, skipped") == 7
    monkeypatch.setattr("dcgen_convert.stages.steps.KEEP", 0)
    changed = job(copy, "keep=resume", "adapt.clip=0.2")
    with pytest.raises(InputError, match=r"done again \(surgery .*latents.*adapt-1 must read them") as refused:
        convert(changed, whole, copy / "out", NULL, until="adapt-1")
    assert "--from surgery" in refused.value.hint and not list((whole / "latents").glob("*.safetensors"))
    console = Console("human", stderr=open(copy / "said.txt", "w"))  # noqa: SIM115  closed with the process
    convert(changed, whole, copy / "out", console, until="adapt-1", consent=lambda _: True)
    assert "latents: runs again, clean has removed files of it that are needed now" in (copy / "said.txt").read_text()
    convert(job(copy, "adapt.clip=0.2"), copy / "stopped", copy / "out", NULL, start="adapt-1", until="adapt-1")
    assert losses(copy, "whole") == losses(copy, "stopped")
    assert not (whole / "adapt-1" / "checkpoints").exists() and list((whole / "latents").glob("*.safetensors"))


def test_the_text_encoders_are_loaded_once(copy, monkeypatch):
    """The empty prompt is encoded while they are loaded for the captions."""
    loads, really = [], source_pipeline.text_encoders
    monkeypatch.setattr(source_pipeline, "text_encoders", lambda *given: loads.append(given) or really(*given))
    convert(job(copy), copy / "whole", copy / "out", NULL, start="latents", until="latents")
    assert len(loads) == 1


def test_a_source_that_changes_while_the_job_runs_is_named(weights):
    source = Source("tiny-flux", weights / "tiny-flux")
    record = source.record("tiny-flux")
    bundle.require_unchanged(source.contents(), record)
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert name in source.known  # both know it by the same name
    other = {**record, "files": {**record["files"], name: "another"}}
    for changed in (other, {**record, "files": {}, "base": other}):
        with pytest.raises(CheckFailed, match=f"{name} of tiny-flux has changed") as caught:
            bundle.require_unchanged(source.contents(), changed)
        assert "resume" in caught.value.hint
