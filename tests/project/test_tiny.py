"""The program that made the shipped checkpoints still runs; the package itself does without it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file

from dcgen_convert.core.files import sha256
from dcgen_convert.tiny import world

sys.path.insert(0, str(Path(__file__).parents[2]))  # the programs are no part of the package
from tools.tiny import assemble, autoencoders

ROOT = Path(__file__).resolve().parents[2]


def tiny(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.tiny", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_gates_measure_the_shipped_parts(tmp_path, weights):
    shutil.copy(weights / "evaluator.safetensors", tmp_path)
    shutil.copytree(weights / "tiny-dc-ae-f64", tmp_path / "dc-f64c128")
    done = tiny(tmp_path, "gates")
    assert done.returncode == 0, done.stderr
    itself, through = (float(x) for x in re.findall(r"accuracy (0\.\d+|1\.0+)", done.stdout))
    assert itself > 0.99 and 0.9 < through <= itself


def test_assemble_writes_what_work_holds(tmp_path, weights):
    work, out = tmp_path / "work", tmp_path / "weights"
    shutil.copytree(weights / "tiny-dc-ae-f32", work / "dc-f32c32")
    shutil.copy(weights / "evaluator.safetensors", work)
    assert tiny(work, "assemble", out).returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["evaluator.safetensors", "tiny-dc-ae-f32"]
    assert (out / "tiny-dc-ae-f32/README.md").read_text() == (weights / "tiny-dc-ae-f32/README.md").read_text()
    for name in ("evaluator.safetensors", "tiny-dc-ae-f32/diffusion_pytorch_model.safetensors"):
        written, shipped = load_file(out / name), load_file(weights / name)
        assert written.keys() == shipped.keys()
        assert all(torch.equal(written[key], shipped[key]) for key in shipped)


def test_equal_weights_are_held_once(tmp_path, weights):
    """Links are relative, so that they hold wherever the folder stands."""
    for name, value in (("a/vae/w", 1.0), ("b/vae/w", 1.0), ("c/w", 2.0)):
        (tmp_path / name).parent.mkdir(parents=True)
        save_file({"x": torch.full((3,), value)}, tmp_path / f"{name}.safetensors")
    for _ in range(2):
        assemble.link_equal(tmp_path)
        links = {file for file in tmp_path.rglob("*.safetensors") if file.is_symlink()}
        assert links == {tmp_path / "b/vae/w.safetensors"}
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load_file(moved / "b/vae/w.safetensors")["x"].tolist() == [1, 1, 1]
    assert load_file(moved / "c/w.safetensors")["x"].tolist() == [2, 2, 2]
    own = [file for file in weights.rglob("*.safetensors") if not file.is_symlink()]
    assert len({sha256(file) for file in own}) == len(own)


def test_a_higher_compression_begins_as_the_lower_one(weights, monkeypatch):
    """What f64 lacks is zero in f128: one cell of f128 then holds four cells of f64, whose own last layers are gone."""
    monkeypatch.setattr(autoencoders, "POOL", 8)
    lower = AutoencoderDC.from_pretrained(weights / "tiny-dc-ae-f64", dtype=torch.float32)
    higher = autoencoders.train("dc-f128c512", 1, 2, 0.0, 0, lambda line: None, lower)
    pictures = world.draw(world.sample_labels(4, 5), 5)
    with torch.no_grad():
        latents = higher.encode(pictures).latent
        error = (higher.decode(latents).sample - pictures).square().mean().item()
        lower.encoder.conv_out.weight.zero_(), lower.encoder.conv_out.bias.zero_()
        lower.decoder.conv_in.weight.zero_(), lower.decoder.conv_in.bias.zero_()
        cells = torch.nn.functional.pixel_unshuffle(lower.encode(pictures).latent, 2)
        packed = (lower.decode(lower.encode(pictures).latent).sample - pictures).square().mean().item()
    assert latents.shape == (4, 512, 1, 1)
    torch.testing.assert_close(latents, cells, rtol=1e-4, atol=1e-5)
    assert abs(error - packed) < 1e-5 * packed


def test_larger_pictures_begin_with_every_weight_of_the_smaller_ones(weights, monkeypatch):
    sides = []
    monkeypatch.setattr(autoencoders, "POOL", 8)
    monkeypatch.setattr(autoencoders, "set_scale", lambda model, side: sides.append(side) or model)  # 512 pictures
    smaller = AutoencoderDC.from_pretrained(weights / "tiny-dc-ae-f64", dtype=torch.float32)
    larger = autoencoders.train("dc-f64c128-256px", 1, 2, 0.0, 0, lambda line: None, smaller)
    for key, value in larger.state_dict().items():
        torch.testing.assert_close(value, smaller.state_dict()[key], rtol=0, atol=0)
    assert sides == [256]


def test_an_unknown_part_prints_the_commands(tmp_path):
    done = tiny(tmp_path, "no-such-part")
    assert done.returncode == 1 and "tools.tiny WORK evaluator" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_package_does_not_import_it():
    sources = (ROOT / "dcgen_convert").rglob("*.py")
    assert not [path for path in sources if re.search(r"^\s*(from|import) tools\b", path.read_text(), re.M)]
