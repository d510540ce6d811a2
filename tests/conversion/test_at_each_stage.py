"""A full disk, Ctrl-C and SIGTERM at each stage of a run: the code, one sentence, no file that is not whole, and a run
that goes on to the same result.
"""

import shutil
import signal

import pytest
from at_stage import run_disturbed
from conftest import STAGES, run_cli, short_settings

from dcgen_convert.core.files import TEMPORARY, read_json, sha256

CONVERT = ["tiny-flux", "--ae", "tiny-dc-ae-f32", "--quantize", "nvfp4", "-o", "bundle", "--run-dir", "run", "-y"]
WHOLE = (".safetensors", ".png")  # files without times in them


@pytest.fixture
def stage(request, converted, tmp_path):
    """The name of a stage, with a run in ``tmp_path`` whose stages before it are done."""
    every = [*STAGES, "bundle", "verify"]
    for name in every[: every.index(request.param)]:
        shutil.copytree(converted / "run" / name, tmp_path / "run" / name)
    return request.param


def whole(folder):
    """The files of a folder that have their final names."""
    return [path for path in folder.rglob("*") if path.suffix in WHOLE and TEMPORARY not in str(path)]


DISTURBANCES = (("disk", 4), (int(signal.SIGINT), 130), (int(signal.SIGTERM), 143))


def disturb(tmp_path, stage, what, code, arguments):
    done = run_disturbed(stage, what, *arguments, cwd=tmp_path)
    assert done.returncode == code, (what, done.returncode, done.stderr[-2000:])
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) <= 1
    assert not (tmp_path / "run" / stage / "stage.json").exists()


@pytest.mark.parametrize("stage", [*STAGES, "bundle"], indirect=True)
def test_a_run_goes_on_after_a_full_disk_and_signals(converted, tmp_path, stage):
    arguments = ["convert", *CONVERT, *short_settings()]
    for what, code in DISTURBANCES:
        disturb(tmp_path, stage, what, code, arguments)
        arguments = ["resume", "run"]
        for path in whole(tmp_path / "run" / stage):
            original = converted / path.relative_to(tmp_path)
            assert not original.exists() or sha256(path) == sha256(original), path
        assert not (tmp_path / "bundle" / "dcgen_manifest.json").exists()
    resumed = run_cli("resume", "run", "--until", stage, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    if stage != "bundle":  # its record names the folder and the times
        results = [read_json(folder / "run" / stage / "stage.json")["result"] for folder in (converted, tmp_path)]
        assert results[0] == results[1]
        return
    for path in (converted / "bundle").rglob("*.safetensors"):
        assert sha256(path) == sha256(tmp_path / path.relative_to(converted)), path


@pytest.mark.parametrize("stage", ["verify"], indirect=True)
def test_signals_while_the_bundle_is_verified(converted, tmp_path, stage):
    """It changes nothing of what is there: the next start checks from the beginning."""
    arguments = ["convert", *CONVERT, *short_settings()]
    for what, code in DISTURBANCES[1:]:
        disturb(tmp_path, stage, what, code, arguments)
        arguments = ["resume", "run"]
        assert not whole(tmp_path / "run" / stage)
