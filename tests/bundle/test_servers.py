"""The lines of docs/servers.md, and what the loaders of vLLM-Omni and SGLang call: each draws the bundle's picture."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from conftest import environment
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline, ModularPipeline
from PIL import Image

from dcgen_convert.bundle import autoencoder_dc_adapter as adapter
from dcgen_convert.checkpoint import trust

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "servers.md").read_text(encoding="utf-8")
SMALL = {  # as the tests run a line
    "1024": "64",
    "steps=20": "steps=2",
    "torch.bfloat16": "torch.float32",
    '.to("cuda")': '.to("cpu")',
    'device("cuda")': 'device("cpu")',
    "cpu_offload()": 'cpu_offload(device="cpu")',
    "compile(fullgraph=True)": 'compile(fullgraph=True, backend="aot_eager")',
}


def lines_of(title: str) -> list[str]:
    """The Python of one section."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    for line, small in SMALL.items():
        blocks = [block.replace(line, small) for block in blocks]
    return blocks


WAYS = [
    pytest.param(block, id=f"{title} {number}")
    for title in ("AutoModel", "Another process", "ModularPipeline", "torch.compile", "CPU offload")
    for number, block in enumerate(lines_of(title), 1)
]


def pixels(image) -> numpy.ndarray:
    return numpy.asarray(image).astype(int)


def picture(pipe) -> numpy.ndarray:
    seed = torch.Generator().manual_seed(0)
    return pixels(pipe("a red fox", height=64, width=64, num_inference_steps=2, generator=seed).images[0])


@pytest.fixture
def place(bundles, monkeypatch, tmp_path) -> Path:
    """A folder with `bundle`, in a program that has not loaded one before."""
    (tmp_path / "bundle").symlink_to(bundles("flux"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, adapter.MODULE_NAME, raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def expected(bundles) -> numpy.ndarray:
    return picture(DiffusionPipeline.from_pretrained(bundles("flux"), trust_remote_code=True))


@pytest.mark.parametrize("block", WAYS)
def test_the_lines_draw_the_picture(block, place, expected):
    found: dict = {}
    exec(compile(block, "servers.md", "exec"), found)
    assert numpy.array_equal(pixels(found["image"]), expected)
    assert type(found["pipe"].vae).__name__ == adapter.CLASS_NAME


def test_a_process_without_this_package_draws_the_picture(place, expected):
    (block,) = lines_of("Another process")
    check = "\nimport sys\nassert not [name for name in sys.modules if name.startswith('dcgen_convert')]\n"
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env["HF_MODULES_CACHE"] = str(place / "modules")
    done = subprocess.run([sys.executable, "-c", block + check], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert numpy.array_equal(pixels(Image.open(place / "fox.png")), expected)


def test_what_does_not_work_says_so(place):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained("bundle")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained("bundle/vae")
    with pytest.raises(ValueError, match="custom code"):
        AutoModel.from_pretrained("bundle", subfolder="vae", trust_remote_code=True)


def test_a_modular_pipeline_does_not_load_the_class_itself(place):
    with pytest.raises(ValueError, match="has not been imported"):
        ModularPipeline.from_pretrained("bundle", trust_remote_code=True)


def test_the_call_of_the_diffusers_backends(place, expected):
    """vLLM-Omni 0.30.0, pipeline_diffusers_adapter.py; SGLang 0.5.23, diffusers_pipeline.py adds `revision`."""
    pipe = DiffusionPipeline.from_pretrained("bundle", torch_dtype=torch.float32, trust_remote_code=True, revision=None)
    assert numpy.array_equal(picture(pipe), expected)


def test_the_autoencoder_of_vllm_omni_s_own_flux_is_refused(place):
    """vLLM-Omni 0.30.0, models/flux/pipeline_flux.py."""
    with pytest.raises(ValueError, match="num_groups"):
        AutoencoderKL.from_pretrained("bundle", subfolder="vae", local_files_only=True)


def test_the_steps_of_sglang_s_loader_give_the_autoencoder(place, bundles, expected, monkeypatch):
    """SGLang 0.5.23, vae_loader.py: the file that auto_map names, as a module that no import knows."""
    Path("bundle").unlink()
    shutil.copytree(bundles("flux"), "bundle")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    config = json.loads(Path("bundle/vae/config.json").read_text())
    file, name = config["auto_map"]["AutoModel"].rsplit(".", 1)
    spec = importlib.util.spec_from_file_location("_custom", os.path.join("bundle/vae", f"{file}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vae = getattr(module, name).from_pretrained("bundle/vae", revision=None, trust_remote_code=True)
    pipe = DiffusionPipeline.from_pretrained("bundle", trust_remote_code=True)
    pipe.vae = vae.to(device="cpu", dtype=torch.float32)
    assert numpy.array_equal(picture(pipe), expected)
    # The latents that its FLUX makes: configs/models/vaes/flux.py and configs/pipeline_configs/flux.py
    cell = 2 ** (len(config["block_out_channels"]) - 1)
    latents = torch.zeros(1, pipe.transformer.config.in_channels // 4, 2 * (64 // (2 * cell)), 2 * (64 // (2 * cell)))
    with torch.no_grad():
        assert vae.decode(latents / vae.config.scaling_factor).sample.shape == (1, 3, 64, 64)
    kept, *more = trust.foreign_files(Path("bundle"))
    assert not more
    assert re.fullmatch(
        r"vae/__pycache__/.*\.pyc is bytecode that Python has kept .*", trust.describe(Path("bundle"), kept)
    )
