"""The real command on a single file in BFL's names: the same converted model as from the folder that it was made
from.
"""

import json

import torch
from checkpoint.test_single_file import BASE, FILE, to_bfl
from conftest import run_cli, short_settings
from safetensors.torch import load_file, save_file

from dcgen_convert.checkpoint.headers import read_weights


def tensors(folder):
    return {
        name: value
        for file in {entry.file for entry in read_weights(folder).values()}
        for name, value in load_file(file).items()
    }


def test_a_bfl_file_converts_to_the_folders_result(converted, tmp_path):
    save_file(
        {f"model.diffusion_model.{name}": value for name, value in to_bfl(load_file(FILE)).items()},
        tmp_path / "mine.safetensors",
    )
    arguments = [
        "mine.safetensors",
        "--base",
        str(BASE),
        "--recipe",
        "tiny-flux",
        "-o",
        "bundle",
        "--run-dir",
        "run",
        "-y",
        "--json",
        "--until",
        "bundle",
    ]
    done = run_cli(*arguments, *short_settings(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [stage["name"] for stage in json.loads(done.stdout)["stages"]][:2] == ["import", "surgery"]
    found, wanted = (tensors(folder / "run" / "merge-1" / "transformer") for folder in (tmp_path, converted))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    record = json.loads((tmp_path / "bundle" / "dcgen_manifest.json").read_text())["sources"]["base"]
    assert list(record["files"]) == ["mine.safetensors"] and record["base"]["name"] == BASE.name
    assert not any(path.is_symlink() for path in (tmp_path / "bundle").rglob("*"))
