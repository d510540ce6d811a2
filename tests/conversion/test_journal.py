"""The run folder believes only what is whole and still holds."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from dcgen_convert.conversion import convert
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import ResourceError
from dcgen_convert.core.files import atomic_write, fresh_folder, replacing
from dcgen_convert.core.journal import Run
from dcgen_convert.recipe.loading import load


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", NULL)


def finish(run, name, inputs, content="x"):
    with run.stage(name, inputs) as stage:
        atomic_write(stage.folder / "artefact", content)
        stage.metrics["figure"] = 3


def test_a_finished_stage_holds_for_its_inputs_only(run):
    assert run.done("a", {"k": 1}) is None
    finish(run, "a", {"k": 1})
    assert run.done("a", {"k": 1})["metrics"] == {"figure": 3}
    assert run.done("a", {"k": 2}) is None


def test_the_changed_input_is_named(run, capsys):
    finish(run, "a", {"k": 1, "same": 5})
    run.console = Console("human", stderr=sys.stdout)
    run.done("a", {"k": 2, "same": 5})
    assert "changed: k" in capsys.readouterr().out


def test_a_lost_or_cut_output_does_not_hold(run):
    finish(run, "a", {})
    artefact = run.path / "a" / "artefact"
    artefact.write_text("longer")
    assert run.done("a", {}) is None
    artefact.unlink()
    assert run.done("a", {}) is None


def test_an_interrupted_stage_keeps_its_partial_work_for_the_same_inputs(run):
    with pytest.raises(KeyboardInterrupt), run.stage("a", {"k": 1}) as stage:
        atomic_write(stage.folder / "half", "h")
        raise KeyboardInterrupt
    assert run.done("a", {"k": 1}) is None
    with run.stage("a", {"k": 1}) as stage:
        assert (stage.folder / "half").exists()
    with run.stage("a", {"k": 2}) as stage:
        assert not (stage.folder / "half").exists()


def interrupted(run, inputs, started=None):
    """Stage `a`, cut off with one file of partial work; ``started`` takes the place of its record."""
    with pytest.raises(KeyboardInterrupt), run.stage("a", inputs) as stage:
        atomic_write(stage.folder / "half", "h")
        raise KeyboardInterrupt
    if started:
        (run.path / "a" / "started.json").write_text(json.dumps(started))


@pytest.mark.parametrize(
    ("started", "changed"),
    [
        (None, "phase.lr"),
        ({"fingerprint": "of version 0.1.0"}, "unknown, an older version did not record the settings"),
    ],
)
def test_deleting_the_partial_work_of_other_inputs_is_told(run, capsys, started, changed):
    interrupted(run, {"phase": {"lr": 1, "steps": 5}}, started)
    run.console = Console("human", stderr=sys.stdout)
    with run.stage("a", {"phase": {"lr": 2, "steps": 5}}):
        pass
    said = " ".join(capsys.readouterr().out.split())
    assert f"a: starts again, changed: {changed}; its unfinished work is deleted (1 files, 0.0 MB, newest half)" in said


def test_nothing_is_told_where_nothing_is_lost(run, capsys):
    with pytest.raises(KeyboardInterrupt), run.stage("a", {"k": 1}):
        raise KeyboardInterrupt
    run.console = Console("human", stderr=sys.stdout)
    with run.stage("a", {"k": 2}):
        pass
    assert capsys.readouterr().out == ""


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
        settings = [f"data.{key}={value}" for key, value in {"count": 1, "steps": 1, "batch": 1, **data}.items()]
        resolved = load("tiny-flux", sets=settings)
        convert(resolved, tmp_path / data.get("kind", "run"), tmp_path / "out", Console("human"), until="data")
        said = capsys.readouterr().err
        text = (tmp_path / data.get("kind", "run") / "data" / "index.jsonl").read_text()
        return [json.loads(line)["caption"] for line in text.splitlines()], re.findall(
            "data: (holds|runs again.*)", said
        )

    mine = {"kind": "folder", "path": folder, "count": 9}
    assert captions(**mine) == (["picture a", "picture b"], [])
    assert captions(**mine) == (["picture a", "picture b"], ["holds"])
    (folder / "b.txt").write_text("picture c")
    assert captions(**mine) == (["picture a", "picture c"], ["runs again, changed: files"])
    shutil.rmtree(folder)
    assert captions(**mine) == (["picture a", "picture c"], ["holds"])
    assert captions(prompts=lines) == (["a red fox"], [])
    lines.write_text("a blue fox")
    assert captions(prompts=lines) == (["a blue fox"], ["runs again, changed: files"])


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
