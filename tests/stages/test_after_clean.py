"""What works on a real finished run after `clean` has removed all that may go, and what does not, in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_cli

from dcgen_convert.core.files import hashes, read_json, write_json
from dcgen_convert.core.names import MANIFEST


@pytest.fixture(scope="module")
def cleaned(converted, tmp_path_factory) -> Path:
    """A folder with a run whose stages are done and whose files are gone. Its bundle is the shared one."""
    folder = tmp_path_factory.mktemp("cleaned")
    shutil.copytree(converted / "run", folder / "run", ignore=shutil.ignore_patterns("*.lock"))
    done = run_cli("clean", "run", "--keep", "bundle", "-y", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["freed"] > 0.9 * document["bytes"] and not [*folder.rglob("*.safetensors")]
    return folder


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["resume", "run"], "bundle"),
        (["runs", "."], "finished"),
        (["report", "run"], "report.html"),
        (["inspect", "BUNDLE"], "nvfp4"),
        (["sample", "BUNDLE", "-p", "a red circle", "--steps", "1"], "0000-seed-0.png"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_works(converted, cleaned, words, shown):
    words = [word.replace("BUNDLE", str(converted / "bundle")) for word in words]
    done = run_cli(*words, cwd=cleaned)
    assert done.returncode == 0, done.stderr[-2000:]
    assert shown in done.stdout
    assert words[0] != "resume" or "runs again" not in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["inspect", "run"], 2, "run is a run folder, not a bundle"),
        (["verify", "run"], 2, "run is a run folder, not a bundle"),
        (["sample", "run", "-p", "x"], 2, "run is a run folder, not a bundle"),
        (["quantize", "BUNDLE", "-o", "out"], 2, "is already quantised (nunchaku_lite)"),
        (["quantize", "run/merge-1/transformer", "--base", "BUNDLE"], 2, "clean has removed its weights"),
        (["resume", "run", "--from", "nothing"], 2, "no stage is called 'nothing'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_work_is_one_sentence(converted, cleaned, words, code, sentence):
    words = [word.replace("BUNDLE", str(converted / "bundle")) for word in words]
    done = run_cli(*words, cwd=cleaned)
    assert done.returncode == code and sentence in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 3 and done.stdout == ""


def test_work_of_hours_is_not_made_again_without_a_word(cleaned, tmp_path):
    """Another number of steps needs what is gone. It is asked for when it took longer than ten minutes."""
    shutil.copytree(cleaned / "run", tmp_path / "run")
    for stage in ("data", "adapt-1"):
        marker = tmp_path / "run" / stage / "stage.json"
        write_json(marker, read_json(marker) | {"seconds": 3600.0})  # the seal does not cover times
    done = run_cli("resume", "run", "--from", "verify", cwd=tmp_path)
    assert done.returncode == 2 and "clean has removed" in done.stderr and "--from surgery" in done.stderr


def test_the_bundle_has_every_byte_and_can_be_published(converted, cleaned, monkeypatch):
    files = read_json(converted / "bundle" / MANIFEST)["files"]
    found = hashes(converted / "bundle" / name for name in files)
    assert found == [entry["sha256"] for entry in files.values()]
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = run_cli("push", str(converted / "bundle"), "me/out", cwd=cleaned)
    assert done.returncode == 3 and "there is no hub token on this machine" in done.stderr
