"""A folder of the wrong kind is refused in one sentence that names the next step, and nothing is written into it."""

import json

import pytest
from conftest import run_cli

from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.core.names import MANIFEST


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run that was stopped, one whose record is torn, a bundle's first files, an empty folder, and a text."""
    folder = tmp_path_factory.mktemp("place")
    done = run_cli(
        *("tiny-flux", "--until", "surgery", "--run-dir", "mein Lauf ä", "-o", "ihr Bündel", "-y"), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    for name in ("bundle", "unfinished"):
        (folder / name).mkdir()
        write_json(folder / name / "model_index.json", {"_class_name": "FluxPipeline"})
    write_json(folder / "bundle" / MANIFEST, {})
    (folder / "torn").mkdir()
    (folder / "torn" / "recipe.json").write_text('{"trunc')
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("no model\n")
    return folder


RUN = "is not a run folder: it has no recipe.json"
LIST = "`dcgen-convert runs` lists the run folders"
NO_BUNDLE = "holds no model_index.json, so it is not a bundle"
WRONG = {
    "resume a bundle": (["resume", "bundle"], 2, RUN, LIST),
    "resume nothing": (["resume", "empty"], 2, RUN, LIST),
    "resume a torn run": (["resume", "torn"], 2, "is not valid JSON", "another --run-dir"),
    "clean a bundle": (["clean", "bundle"], 2, RUN, LIST),
    "report nothing": (["report", "empty"], 2, RUN, LIST),
    "report the folder of runs": (["report", "."], 2, RUN, LIST),
    "evaluate nothing": (["evaluate", "empty"], 2, NO_BUNDLE, "`convert` printed"),
    "evaluate a run": (["evaluate", "mein Lauf ä"], 2, "mein Lauf ä is a run folder, not a bundle", "its bundle is "),
    "evaluate half a bundle": (["evaluate", "unfinished"], 1, "it is not a finished bundle", "resume it"),
    "verify a run": (["verify", "mein Lauf ä"], 2, "mein Lauf ä is a run folder, not a bundle", "its bundle is "),
    "sample with a run": (["sample", "mein Lauf ä", "-p", "x"], 2, "is a run folder, not a bundle", "its bundle is "),
    "sign a run": (["sign", "mein Lauf ä"], 2, "is a run folder, not a bundle", "its bundle is "),
    "export nothing": (["export", "empty", "-o", "out"], 2, NO_BUNDLE, "`convert` printed"),
    "push nothing": (["push", "empty", "me/out"], 2, NO_BUNDLE, "`convert` printed"),
    "inspect a run": (["inspect", "mein Lauf ä"], 2, "is a run folder, not a bundle", "its bundle is "),
    "inspect a text": (["inspect", "notes.txt"], 2, "notes.txt is no safetensors file", "give a .safetensors"),
    "inspect a name": (["inspect", "tiny-flux"], 2, "no such file or folder", "dcgen-convert plan tiny-flux"),
    "a file as a bundle": (["verify", "notes.txt"], 2, "notes.txt is a file, and a folder is needed", "--help"),
    "a name as a bundle": (["sample", "tiny-flux", "-p", "x"], 2, "there is no folder tiny-flux", "--help"),
    "output is a file": (["sample", "bundle", "-p", "x", "-o", "notes.txt"], 2, "notes.txt is no folder", "--output"),
    "output in a file": (["sample", "bundle", "-p", "x", "-o", "notes.txt/a"], 2, "notes.txt is no folder", "--output"),
    "an issuer of nobody": (["verify", "bundle", "--issuer", "https://x"], 2, "none is named", "add --signed-by"),
    "the end before the start": (
        ["resume", "mein Lauf ä", "--from", "data", "--until", "surgery"], 2, "data comes after surgery", "--until",
    ),
    "a run in a bundle": (
        ["convert", "tiny-flux", "--run-dir", "bundle"], 2, "holds a model, and a run needs a folder", "--run-dir",
    ),
    "a run in a file": (["convert", "tiny-flux", "--run-dir", "notes.txt"], 2, "notes.txt is no folder", "--run-dir"),
    "a name that no repository has": (
        ["convert", "tiny-flux", "--push-to", "noslash", "--run-dir", "new"], 2, "'noslash'", "ORG/NAME",
    ),
    "private, and no repository": (["tiny-flux", "--private", "--run-dir", "new"], 2, "none is named", "--push-to"),
    "a plan by no rehearsal": (["plan", "tiny-flux", "--measured", "torn/recipe.json"], 2, "not valid", "rehearse"),
    "a number that is a word": (["sample", "bundle", "-p", "x", "--steps", "a"], 2, "valid whole number", "--help"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "code", "sentence", "hint"), WRONG.values(), ids=WRONG)
def test_a_wrong_folder_is_one_sentence(place, words, code, sentence, hint):
    before = [*place.rglob("*")]
    done = run_cli(*words, "--json", cwd=place)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == code, error
    assert sentence in error["message"] and hint in error["hint"], error
    assert [*place.rglob("*")] == before


def test_a_damaged_marker_names_the_command_that_makes_its_stage_again(place):
    marker = place / "mein Lauf ä" / "surgery" / "stage.json"
    before = marker.read_bytes()
    marker.write_text("{")
    error = json.loads(run_cli("report", "mein Lauf ä", "--json", cwd=place).stdout)["error"]
    marker.write_bytes(before)
    assert error["hint"] == "dcgen-convert resume 'mein Lauf ä' --from surgery makes the stage again"


def test_the_bundle_of_a_run_is_named_with_its_path(place):
    error = json.loads(run_cli("verify", "mein Lauf ä", "--json", cwd=place).stdout)["error"]
    assert error["hint"] == f"its bundle is {read_json(place / 'mein Lauf ä' / 'recipe.json')['output']}"
    assert error["hint"].endswith("ihr Bündel")
