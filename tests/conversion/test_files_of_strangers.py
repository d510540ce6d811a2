"""Names and files that do not stay where they belong, cannot be written, or are no files at all."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
from conftest import WEIGHTS, environment
from fuzz.harness import limited

from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.bundle.layout import check_output
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core import files, journal
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import DcgenError, InputError, RecipeError, ResourceError
from dcgen_convert.core.journal import Run
from dcgen_convert.data import images
from dcgen_convert.recipe import loading


@pytest.mark.parametrize("name", ["../../esc", "/esc", "a/b", "..", "", "a\\b", "x\x1b[2J", "a" * 300, "caf\udce9"])
def test_a_recipe_names_one_folder(tmp_path, name):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: tiny-flux\nname: {json.dumps(name)}\n")
    with pytest.raises(RecipeError, match="no name of a folder"):
        loading.load(str(path))


def test_a_name_in_any_script_is_taken(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny-flux\nname: Bär 熊 v1.0\n", encoding="utf-8")
    assert loading.load(str(path)).recipe.name == "Bär 熊 v1.0"


def test_written_files_follow_the_umask(tmp_path):
    code = (
        "import os; os.umask(0o027)\n"
        "from pathlib import Path\nfrom dcgen_convert.core.files import write_json\nwrite_json(Path('x.json'), {})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o640


def test_a_path_of_any_bytes_is_recorded(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    files.write_json(tmp_path / "x.json", {"output": name})
    assert files.read_object(tmp_path / "x.json") == {"output": name}
    index, picture = tmp_path / "index.jsonl", tmp_path / f"{name}.png"
    images.write_index(index, [images.Picture(picture, "a fox")], tmp_path)
    assert [found.file for found in images.read_index(index, tmp_path)] == [picture]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):  # no such file system is at hand
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal.fcntl, "flock", refuse)
    with pytest.raises(ResourceError, match=r"lock cannot be locked: No locks available"), Run(tmp_path, NULL).locked():
        pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_broken_disk_is_told_with_the_path_and_leaves_nothing(tmp_path, monkeypatch, call):
    def refuse(*arguments):
        raise OSError(errno.EIO, "Input/output error", *(str(item) for item in arguments if not isinstance(item, int)))

    monkeypatch.setattr(files.os, call, refuse)
    with pytest.raises(OSError) as caught:
        files.write_json(tmp_path / "x.json", {})
    assert "x.json" in caught.value.filename
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_cannot_be_written_is_told_at_the_start(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match=r"nothing can be written into"):
        check_output(tmp_path / "bundle", force=False)


PIPES = (
    "model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
    "transformer/x.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "README.md",
    "text_encoder/config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_a_source_is_not_waited_for(tmp_path, name):
    source = tmp_path / "source"
    shutil.copytree(WEIGHTS / "tiny-flux", source)
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    for use in (lambda: inspect(source), lambda: load_source("x", str(source), home=tmp_path / "home").fingerprint):
        try:
            with limited(20):
                use()
        except (DcgenError, FileNotFoundError) as error:
            assert str(source) in str(error)


def test_a_source_that_cannot_be_had_is_told_before_anything_is_begun(tmp_path):
    code = (
        "import sys\nfrom dcgen_convert.cli import app\n"
        "try: app.main(['flux-krea', '-y'])\n"
        "finally: print([name for name in ('torch', 'diffusers') if name in sys.modules])"
    )
    env = {**environment(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.strip() == "[]"
    assert "FLUX.1-Krea-dev is not in the local cache and cannot be fetched" in done.stderr
    assert not (tmp_path / "runs").exists()
