"""The real command on a single file in BFL's names: the same converted model as from the folder that it was made
from.
"""

import json

import torch
from checkpoint.test_single_file import BASE, FILE, to_bfl
from conftest import run_cli, short_settings
from safetensors.torch import load_file, save_file

from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.core.console import NULL
from dcgen_convert.core.journal import Run
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages.job import prepare


def tensors(folder):
    return {
        name: value
        for file in {entry.file for entry in read_weights(folder).values()}
        for name, value in load_file(file).items()
    }


def test_the_sizes_of_pictures_are_known_before_a_file_is_written_as_a_pipeline(tmp_path):
    """Buckets follow from the autoencoder of the base, which completes the file."""
    save_file(to_bfl(load_file(FILE)), tmp_path / "mine.safetensors")
    found = []
    for source, base in ((str(tmp_path / "mine.safetensors"), str(BASE)), (str(BASE), None)):
        flags = {"ae": "tiny-dc-ae-f32", **({"base": base} if base else {})}
        sets = ["data.kind=folder", "data.path=x", "data.buckets=on", "adapt.phases.0.resolution=256"]
        job = prepare(load(source, flags=flags, sets=sets, recipe="tiny-flux"), Run(tmp_path / "run", NULL), NULL)
        assert job.source.imported == bool(base) and not (tmp_path / "run" / "import").exists()
        found.append(job.buckets)
    assert found[0] == found[1] and len(found[0][256]) > 1


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
