"""What a run folder still needs, what is removed, and what must be made again afterwards."""

import os
import sys
from dataclasses import asdict

import pytest

import dcgen_convert
from dcgen_convert.cli.app import cli
from dcgen_convert.cli.session import Session
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.core.journal import PEAK, SEAL, TIMES, Run, Wanted, fingerprint, removed
from dcgen_convert.core.version import __version__
from dcgen_convert.evaluation.report import write_report
from dcgen_convert.planning import needs
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages.steps import Step, Survey, wanted

RESOLVED = load("tiny-flux", sets=["quantize.format=nvfp4"])
PARTS = needs.parts(RESOLVED.recipe, False)
FILES = {
    "surgery": ["transformer/a.safetensors", "transformer/config.json", "surgery.json"],
    "data": ["pictures/0.png", "pictures/1.png", "index.jsonl"],
    "latents": ["target-128-00000.safetensors", "index.json", "roundtrip.png", "autoencoder/b.safetensors"],
    "align-embedder": ["modules.safetensors"],
    "align-head": ["modules.safetensors", "training/checkpoints/step-000004/c.safetensors", "training/metrics.jsonl"],
    "adapt-1": ["export/d.safetensors", "checkpoints/step-000004/e.safetensors", "metrics.jsonl", "samples/s.png"],
    "merge-1": ["transformer/f.safetensors", "transformer/config.json"],
    "quantize": ["calls/g.safetensors", "calls/done.json", "transformer/h.safetensors", "transformer/config.json"],
    "bundle": ["dcgen_manifest.json", "begun.json"],
    "verify": ["grid.png"],
}
BY_PRODUCTS = [
    "adapt-1/checkpoints/step-000004/e.safetensors",
    "align-head/training/checkpoints/step-000004/c.safetensors",
    "quantize/calls/done.json",
    "quantize/calls/g.safetensors",
]
READ = {
    "surgery/transformer/a.safetensors": ("align-embedder", "align-head", "adapt-1", "merge-1"),
    "data/pictures/0.png": ("latents",),
    "data/pictures/1.png": ("latents",),
    "latents/target-128-00000.safetensors": ("align-embedder", "align-head", "adapt-1", "merge-1"),
    "latents/autoencoder/b.safetensors": ("adapt-1", "quantize", "bundle", "verify"),
    "align-embedder/modules.safetensors": ("align-head",),
    "align-head/modules.safetensors": ("adapt-1",),
    "adapt-1/export/d.safetensors": ("merge-1",),
    "merge-1/transformer/f.safetensors": ("quantize", "verify"),
    "quantize/transformer/h.safetensors": ("bundle",),
}


def steps():
    """The walk, with stages that depend on nothing but the one before."""
    names = [*FILES]
    return [Step(name, lambda *_: None, {}, (before,) if before else ()) for before, name in zip(["", *names], names)]  # noqa: B905


def fill(stage):
    for number, name in enumerate(FILES[stage.folder.name], 1):
        path = stage.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b" " * 100 * number)


@pytest.fixture
def run(tmp_path):
    """A finished run with small files, and its bundle."""
    run = Run(tmp_path / "run", NULL)
    record = {"recipe": RESOLVED.recipe.model_dump(mode="json"), "machine": asdict(RESOLVED.machine)}
    write_json(run.path / "recipe.json", {**record, "output": str(tmp_path / "bundle"), "version": __version__})
    known = {}
    for step in steps():
        with run.stage(wanted(step, known), run.look(wanted(step, known))) as stage:
            fill(stage)
        known[step.name] = run.look(wanted(step, known))
    (tmp_path / "bundle").mkdir()
    write_json(tmp_path / "bundle" / "dcgen_manifest.json", {})
    return run


def files(run):
    return {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}


def clean(run, keep="bundle", delete=True):
    """The files that went, and the document."""
    before = files(run)
    document = dcgen_convert.clean(run.path, keep=keep, delete=delete).document()
    return sorted(before - files(run) - {"lock"}), document


def age(run, stage, seconds):
    """Make believe that a stage took so long."""
    record = {key: value for key, value in run.record(stage).items() if key != SEAL}
    seal = fingerprint({key: value for key, value in record.items() if key not in (PEAK, *TIMES)})
    write_json(run.path / stage / "stage.json", {**record, "seconds": seconds, SEAL: seal})


def test_the_table_says_who_needs_what_and_changes_nothing(run):
    gone, document = clean(run, "resume", delete=False)
    assert gone == [] and document["status"] == "planned" and document["schema"] == "dcgen.clean/1"
    keys = ["schema", "status", "run", "keep", "bytes", "freed", "parts"]  # frozen: scripts read them
    assert [*document] == keys
    rows = {(row["stage"], row["holds"]): row for row in document["parts"]}
    row = rows["adapt-1", "checkpoints of its training"]
    assert row["bytes"] == 200 and row["removed"] and row["use"] == "more steps of this training"
    assert not rows["latents", "latents and text embeddings"]["removed"]
    assert document["bytes"] == sum(row["bytes"] for row in document["parts"])
    assert document["freed"] == sum(row["bytes"] for row in document["parts"] if row["removed"]) == 700


@pytest.mark.parametrize(("keep", "expected"), [("resume", BY_PRODUCTS), ("bundle", sorted([*BY_PRODUCTS, *READ]))])
def test_what_goes_from_a_finished_run(run, keep, expected):
    assert clean(run, keep)[0] == expected
    assert not (run.path / "quantize" / "calls").exists() and (run.path / "quantize" / "stage.json").exists()
    assert clean(run, keep) == ([], clean(run, keep)[1])
    again = Run(run.path, NULL)
    survey = Survey(again, steps(), [], (), PARTS)
    assert not survey.open and not survey.again and not survey.lost  # it holds, though it is no more there
    assert [path.relative_to(run.path).as_posix() for path, _ in removed(run.path)] == expected
    assert dcgen_convert.runs(run.path).runs[0]["stages"] == [*FILES]
    assert write_report(run.path).exists()


@pytest.mark.parametrize("stage", [name for name in FILES if name != "verify"])
def test_nothing_goes_that_an_unfinished_stage_needs(run, stage):
    """Every stage unfinished in turn, with those behind it; and its own work is not touched."""
    after = [*FILES][[*FILES].index(stage) :]
    for name in after:
        (run.path / name / "stage.json").unlink()
    gone = set(clean(run)[0])
    done = [name for name in FILES if name not in after]
    free = {name for name in BY_PRODUCTS if name.split("/")[0] in done}
    free |= {name for name, readers in READ.items() if {*readers, name.split("/")[0]} <= {*done}}
    assert gone == free


def test_a_stage_that_the_last_command_had_to_run_again_is_not_done(run):
    write_json(run.path / "open.json", {"stages": ["latents"]})
    assert "data/pictures/0.png" not in clean(run)[0]


def test_without_the_bundle_what_it_is_made_from_stays(run):
    (run.path.parent / "bundle" / "dcgen_manifest.json").unlink()
    assert not {"quantize/transformer/h.safetensors", "latents/autoencoder/b.safetensors"} & {*clean(run)[0]}


def test_files_of_others_stay_and_links_free_nothing(run, tmp_path):
    (run.path / "latents" / "mine.safetensors").write_bytes(b"x")
    (run.path / "notes").mkdir()
    (run.path / "notes" / "a.txt").write_text("x")
    (run.path / ".tmp-1-x").mkdir()
    (run.path / ".tmp-1-x" / "half").write_bytes(bytes(50))
    os.link(run.path / "surgery" / "transformer" / "a.safetensors", tmp_path / "elsewhere")
    expected = sum(size for row in clean(run, delete=False)[1]["parts"] if row["removed"] for size in [row["bytes"]])
    gone, document = clean(run)
    assert {"latents/mine.safetensors", "notes/a.txt"} <= files(run)
    assert ".tmp-1-x/half" in gone and not (run.path / ".tmp-1-x").exists()
    assert document["freed"] == expected - 100


def test_a_stage_that_the_recipe_lost_goes_with_the_last_level_only(run):
    with run.stage(Wanted("merge-2", {}), run.look(Wanted("merge-2", {}))) as stage:
        (stage.folder / "x.safetensors").write_bytes(b"x")
    assert "merge-2/x.safetensors" not in clean(run, "resume")[0]
    assert {"merge-2/x.safetensors", "merge-2/stage.json"} <= {*clean(run)[0]}


def test_a_run_in_use_and_other_folders_are_refused(run, tmp_path):
    with run.locked(), pytest.raises(ResourceError, match="another process works"):
        clean(run)
    with pytest.raises(InputError, match="not a run folder"):
        dcgen_convert.clean(tmp_path / "bundle")


def test_what_must_be_made_again_is_said_and_asked(run):
    """A stage that has to run wants files that are gone: of its own readers only, and of theirs."""
    clean(run)
    for stage in FILES:
        age(run, stage, 3600)
    asked = []
    survey = Survey(Run(run.path, NULL), steps(), ["verify"], (), PARTS)
    assert [*survey.again] == ["surgery", "data", "latents", "align-embedder", "align-head", "adapt-1", "merge-1"]
    with pytest.raises(InputError, match=r"7 h .*clean has removed.*verify must read them") as caught:
        survey.require_consent(lambda text: bool(asked.append(text)))
    assert "--from surgery" in caught.value.hint and asked == [caught.value.message]
    survey.require_consent(lambda _: True)
    assert not Survey(Run(run.path, NULL), steps(), ["verify"], (), []).again


def test_the_work_that_a_damaged_file_costs_is_asked_for_when_its_checkpoints_are_gone(run):
    for cleaned in (False, True):
        if cleaned:
            clean(run, "resume")
            age(run, "adapt-1", 3600)
        (run.path / "adapt-1" / "export" / "d.safetensors").write_bytes(b"damaged")
        survey = Survey(Run(run.path, NULL), steps(), [], (), PARTS)
        assert survey.found["adapt-1"].state == "damaged" and bool(survey.lost["adapt-1"]) == cleaned


def test_what_is_made_again_and_equal_changes_nothing_behind_it(run):
    clean(run)
    grown = Wanted("data", {}, extends=True)
    record = {key: value for key, value in run.record("data").items() if key != SEAL}
    record["origin"] = "of fewer pictures"
    seal = fingerprint({key: value for key, value in record.items() if key not in (PEAK, *TIMES)})
    write_json(run.path / "data" / "stage.json", {**record, SEAL: seal})
    with run.stage(grown, run.look(grown), again=True) as stage:
        fill(stage)
    found = run.look(grown)
    assert found.state == "holds" and not found.cleaned and found.origin == "of fewer pictures"


def test_cleaned_work_is_not_gone_on_with(run):
    clean(run)
    goes_on = Wanted("data", {"k": 2}, extends=True, continues=lambda _: "1 -> 2")
    found = run.look(goes_on)
    assert found.state == "outdated" and "clean has removed" in found.reason


def test_the_marker_keeps_its_time_and_its_seal(run):
    marker = run.path / "data" / "stage.json"
    before = marker.stat().st_mtime_ns
    clean(run)
    assert marker.stat().st_mtime_ns == before
    assert read_json(marker)["cleaned"] == ["pictures/0.png", "pictures/1.png"] and run.record("data")


def test_the_command_shows_first_and_removes_with_yes(run, capfd):
    def call(*arguments):
        words = ["clean", str(run.path), "--keep", "bundle", *arguments]
        assert cli.main(words, standalone_mode=False, obj=Session(words)) == 0
        sys.stdout.flush()
        return capfd.readouterr().out

    before = files(run)
    shown = call()
    assert "nothing was removed, -y removes it" in shown and files(run) == before | {"lock"}
    assert "the training pictures; only for more pictures, or another autoencoder" in shown
    call("-y")
    assert len(before) - len(files(run)) == len(BY_PRODUCTS) + len(READ) - 1  # and the lock is new
