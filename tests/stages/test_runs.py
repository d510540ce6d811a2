"""The list of run folders: state, size and age of each."""

import os
import time

import pytest

import dcgen_convert
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import Run


def make(folder, stages, age):
    for number, name in enumerate(stages):
        (folder / name).mkdir(parents=True)
        (folder / name / "stage.json").write_text("{}")
        os.utime(folder / name / "stage.json", (number, number))
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text("{}")
    (folder / "weights").write_bytes(bytes(1000))
    os.link(folder / "weights", folder / "again")
    os.utime(folder / "weights", (time.time() - age,) * 2)
    os.utime(folder / "recipe.json", (time.time() - age,) * 2)
    return folder


def test_state_size_and_age_of_every_run(tmp_path):
    make(tmp_path / "b", ["surgery", "data"], 50)
    make(tmp_path / "a", ["surgery", "verify"], 500)
    held = make(tmp_path / "c", [], 5)
    (tmp_path / "other").mkdir()
    with Run(held, NULL).locked():
        found = dcgen_convert.runs(tmp_path).runs
    assert [(run["run"], run["state"], run["stages"]) for run in found] == [
        (str(tmp_path / "a"), "finished", ["surgery", "verify"]),
        (str(tmp_path / "b"), "stopped", ["surgery", "data"]),
        (str(held), "running", []),
    ]
    assert 500 <= found[0]["age"] < 800 and 50 <= found[1]["age"] < 350
    assert found[2]["bytes"] == 1002 and found[1]["bytes"] == 1006
    assert dcgen_convert.runs(tmp_path / "b").runs[0]["run"] == str(tmp_path / "b")


def test_no_folder_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        dcgen_convert.runs(tmp_path / "none")
