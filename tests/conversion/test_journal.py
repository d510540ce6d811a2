"""The run folder believes only what is whole and still holds."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from dcgen_convert.conversion import convert
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import CheckFailed, ResourceError
from dcgen_convert.core.files import atomic_save, atomic_write, fresh_folder, read_json, replacing, write_json
from dcgen_convert.core.journal import Run, Wanted
from dcgen_convert.recipe.loading import load


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", NULL)


def finish(run, inputs, content="x", name="a", **how):
    """Run a stage that writes one file; what stood in its folder before."""
    wanted = Wanted(name, inputs, **how)
    found = run.look(wanted)
    with run.stage(wanted, found) as stage:
        atomic_write(stage.folder / "artefact", content)
        stage.metrics["figure"] = 3
    return found


def interrupt(run, inputs, **how):
    """Stage `a`, cut off with one file of partial work."""
    wanted = Wanted("a", inputs, **how)
    with pytest.raises(KeyboardInterrupt), run.stage(wanted, run.look(wanted)) as stage:
        atomic_write(stage.folder / "half", "h")
        raise KeyboardInterrupt


def state(run, inputs, **how):
    return run.look(Wanted("a", inputs, **how)).state


def test_a_finished_stage_holds_for_its_inputs_only(run):
    assert state(run, {"k": 1}) == "nothing"
    finish(run, {"k": 1})
    found = run.look(Wanted("a", {"k": 1}))
    assert found.state == "holds" and found.record["metrics"] == {"figure": 3}
    assert state(run, {"k": 2}) == "outdated"


def test_inputs_that_an_earlier_version_named_otherwise_still_hold(run):
    renamed = {"recorded": lambda old: {"new": old["old"]}}
    interrupt(run, {"old": 1})
    assert state(run, {"new": 1}, **renamed) == "interrupted" and state(run, {"new": 1}) == "outdated"
    finish(run, {"old": 1})
    assert state(run, {"new": 1}, **renamed) == "holds"
    found = run.look(Wanted("a", {"new": 2}, **renamed))
    assert (found.state, found.reason) == ("outdated", "changed: new")


def test_the_changed_input_and_the_work_are_named(run):
    finish(run, {"k": 1, "same": 5, "phase": {"lr": 1}})
    found = run.look(Wanted("a", {"k": 2, "same": 5, "phase": {"lr": 2}}))
    assert found.reason == "changed: k, phase.lr" and found.seconds == found.record["seconds"]


def test_files_without_a_record_of_their_inputs_are_not_believed(run):
    (run.path / "a").mkdir()
    assert state(run, {}) == "nothing"
    (run.path / "a" / "half").write_text("h")
    found = run.look(Wanted("a", {}))
    assert (found.state, found.reason) == ("outdated", "unknown, it has no record of its inputs")
    finish(run, {})
    assert not (run.path / "a" / "half").exists()


@pytest.mark.parametrize("repair", ["file", "entry"])
def test_a_changed_bit_a_cut_and_a_lost_output_are_found_and_made_again(tmp_path, repair):
    for damage in (lambda path: path.write_text("y"), lambda path: path.write_text(""), lambda path: path.unlink()):
        run = Run(tmp_path / "run", NULL)
        finish(run, {})
        damage(run.path / "a" / "artefact")
        run = Run(tmp_path / "run", NULL)  # another process: within one nothing is checked twice
        before = finish(run, {}, repair=repair)
        assert before.state == "damaged" and before.damaged == ("artefact",)
        assert state(run, {}) == "holds" and run.look(Wanted("a", {})).result == before.result


@pytest.mark.parametrize("repair, kept", [("file", True), ("entry", False), ("all", False)])
def test_what_a_damaged_output_costs(tmp_path, repair, kept):
    wanted = Wanted("a", {}, repair=repair)
    run = Run(tmp_path, NULL)
    with run.stage(wanted, run.look(wanted)) as stage:
        (stage.folder / "part").mkdir()
        for name in ("part/damaged", "part/beside", "apart"):
            atomic_write(stage.folder / name, "x")
    (run.path / "a" / "part" / "damaged").write_text("y")
    run = Run(tmp_path, NULL)
    with run.stage(wanted, run.look(wanted)) as stage:
        assert not (stage.folder / "part" / "damaged").exists()
        assert (stage.folder / "part" / "beside").exists() == kept
        assert (stage.folder / "apart").exists() == (repair != "all")


def test_without_a_check_only_sizes_are_compared(run, tmp_path):
    finish(run, {})
    (run.path / "a" / "artefact").write_text("y")
    assert Run(tmp_path / "run", NULL, check=False).look(Wanted("a", {})).state == "holds"
    (run.path / "a" / "artefact").write_text("longer")
    assert Run(tmp_path / "run", NULL, check=False).look(Wanted("a", {})).state == "damaged"


def test_a_note_that_no_stage_reads_is_told_and_costs_nothing(run, tmp_path, capsys):
    finish(run, {}, result=("other",))
    (run.path / "a" / "artefact").write_text("y")
    again = Run(tmp_path / "run", Console("human", stderr=sys.stdout))
    assert again.look(Wanted("a", {}, ("other",))).state == "holds"
    assert "artefact is not what the stage wrote" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("damage", [lambda text: text.replace("figure", "figurf"), lambda text: text[:-9]])
def test_a_damaged_marker_is_refused_with_the_command_that_helps(run, damage):
    finish(run, {"k": 1})
    marker = run.path / "a" / "stage.json"
    marker.write_text(damage(marker.read_text()))
    with pytest.raises(CheckFailed, match=r"a/stage\.json") as caught:
        state(run, {"k": 1})
    assert "--from a" in caught.value.hint


def test_an_interrupted_stage_keeps_its_partial_work_for_the_same_inputs(run):
    interrupt(run, {"k": 1})
    assert state(run, {"k": 1}) == "interrupted"
    finish(run, {"k": 1})
    assert (run.path / "a" / "half").exists()
    finish(run, {"k": 2})
    assert not (run.path / "a" / "half").exists()


def test_seconds_of_work_add_up_over_interruptions(run):
    interrupt(run, {"k": 1})
    started = run.path / "a" / "started.json"
    write_json(started, {**read_json(started), "spent": 100.0, "begun": read_json(started)["begun"] - 50})
    assert 149 < run.look(Wanted("a", {"k": 2})).seconds < 160
    finish(run, {"k": 1})
    assert run.look(Wanted("a", {"k": 2})).seconds > 149


def test_a_stage_that_can_go_on_with_the_change_keeps_its_files_and_tells(run):
    goes_on = {"continues": lambda old: f"{old['k']} -> 2"}
    interrupt(run, {"k": 1})
    assert finish(run, {"k": 2}, **goes_on).state == "continues"
    record = run.look(Wanted("a", {"k": 2})).record
    assert (run.path / "a" / "half").exists() and record["history"] == ["1 -> 2"]


def test_every_change_that_a_stage_went_on_with_is_remembered(run):
    goes_on = {"continues": lambda old: f"from {old['k']}"}
    interrupt(run, {"k": 1})
    interrupt(run, {"k": 2}, **goes_on)
    finish(run, {"k": 2})
    interrupt(run, {"k": 3}, **goes_on)
    assert state(run, {"k": 3}) == "interrupted"  # the marker of what it was before is gone
    finish(run, {"k": 3})
    assert run.look(Wanted("a", {"k": 3})).record["history"] == ["from 1", "from 2"]


def test_damage_is_mended_too_when_a_stage_goes_on_with_a_change(run, tmp_path):
    finish(run, {"k": 1})
    (run.path / "a" / "artefact").write_text("y")
    run = Run(tmp_path / "run", NULL)
    wanted = Wanted("a", {"k": 2}, continues=lambda _: "more")
    found = run.look(wanted)
    assert (found.state, found.damaged) == ("continues", ("artefact",))
    with run.stage(wanted, found) as stage:
        assert not (stage.folder / "artefact").exists()


def test_an_extended_result_remembers_the_one_that_it_extends(run):
    finish(run, {"k": 1}, extends=True)
    first = run.look(Wanted("a", {"k": 1}))
    finish(run, {"k": 2}, "more", extends=True, continues=lambda old: "more")
    second = run.look(Wanted("a", {"k": 2}))
    assert second.origin == first.result != second.result
    finish(run, {"k": 3}, "other", extends=True)
    third = run.look(Wanted("a", {"k": 3}))
    assert third.origin == third.result


def test_unfinished_files_are_no_outputs(run):
    wanted = Wanted("a", {})
    with run.stage(wanted, run.look(wanted)) as stage:
        (stage.folder / ".tmp-1-half").write_text("h")
        atomic_write(stage.folder / "artefact", "x")
    assert list(run.record("a")["outputs"]) == ["artefact"]


def test_what_was_made_from_a_damaged_result_holds_when_it_is_mended(run, tmp_path):
    finish(run, {})
    first = run.look(Wanted("a", {}))
    (run.path / "a" / "artefact").write_text("y")
    run = Run(tmp_path / "run", NULL)
    finish(run, {}, "rounded otherwise")
    second = run.look(Wanted("a", {}))
    assert second.origin == first.result != second.result


def test_unfinished_folders_and_damaged_shards_are_removed_before_a_stage_continues(run):
    wanted = Wanted("a", {})
    with pytest.raises(KeyboardInterrupt), run.stage(wanted, run.look(wanted)) as stage:
        (stage.folder / ".tmp-1-transformer").mkdir()
        for name in ("good", "bad"):
            atomic_save({"z": torch.arange(4.0)}, stage.folder / f"{name}.safetensors")
        raise KeyboardInterrupt
    bad = run.path / "a" / "bad.safetensors"
    content = bytearray(bad.read_bytes())
    content[-3] ^= 8
    bad.write_bytes(content)
    finish(run, {})
    assert sorted(path.name for path in (run.path / "a").iterdir()) == ["artefact", "good.safetensors", "stage.json"]


def test_data_are_read_again_when_the_files_behind_them_changed(tmp_path, capsys):
    """The index that stage `data` writes follows the folder; a folder that is gone does not undo what is done."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (128, 128)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    lines = tmp_path / "prompts.txt"
    lines.write_text("a red fox")

    def captions(**data):
        settings = [f"data.{key}={value}" for key, value in {"count": 2, "steps": 1, "batch": 2, **data}.items()]
        resolved = load("tiny-flux", sets=settings)
        convert(resolved, tmp_path / data.get("kind", "run"), tmp_path / "out", Console("human"), until="data")
        said = capsys.readouterr().err
        text = (tmp_path / data.get("kind", "run") / "data" / "index.jsonl").read_text()
        return [json.loads(line)["caption"] for line in text.splitlines()], re.findall(
            r"data: (holds|starts again, changed: [^;]*|continues, .*)", said
        )

    mine = {"kind": "folder", "path": folder, "count": 9}
    assert captions(**mine) == (["picture a", "picture b"], [])
    assert captions(**mine) == (["picture a", "picture b"], ["holds"])
    (folder / "b.txt").write_text("picture c")
    assert captions(**mine) == (["picture a", "picture c"], ["starts again, changed: the contents of data.path"])
    shutil.rmtree(folder)
    assert captions(**mine) == (["picture a", "picture c"], ["holds"])
    assert captions(prompts=lines) == (["a red fox"] * 2, [])
    lines.write_text("a blue fox")
    assert captions(prompts=lines) == (["a blue fox"] * 2, ["starts again, changed: the captions"])
    lines.write_text("# sorted\na blue fox\na cat\n\na blue fox\n")
    assert captions(prompts=lines) == (["a blue fox"] * 2, ["holds"])
    drawn = (tmp_path / "run" / "data" / "pictures" / "0000000.png").stat().st_mtime_ns
    more = (["a blue fox", "a blue fox", "a cat"], ["continues, 2 -> 3 pictures"])
    assert captions(prompts=lines, count=3) == more
    assert (tmp_path / "run" / "data" / "pictures" / "0000000.png").stat().st_mtime_ns == drawn


def test_a_second_process_is_refused_and_a_dead_one_is_no_obstacle(run):
    code = "import sys; from pathlib import Path; from dcgen_convert.core.journal import Run\n"
    code += "with Run(Path(sys.argv[1]), None).locked(): print('in', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "in\n"
        with pytest.raises(ResourceError, match="another process"), run.locked():
            pass
    finally:
        holder.kill()
        holder.wait()
    with run.locked():
        pass


def test_replacing_leaves_the_old_file_when_the_body_fails(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_fresh_folder_is_empty(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "x").write_text("x")
    assert list(fresh_folder(folder).iterdir()) == []
