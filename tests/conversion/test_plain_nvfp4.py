"""`quantize --container bfl` through the real command: a bundle that stock diffusers opens and draws with in another
process, with its own lines of the model card.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import copy_stages, run_cli, short_settings
from PIL import Image
from safetensors.torch import load_file, save_file

from dcgen_convert.bundle import loading
from dcgen_convert.bundle.expected import expected_tensors
from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.bundle.sample import sample
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.evaluation.metrics import psnr_of

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROMPT = "a small plain red circle in the center on sand"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(bundle, the verb's JSON)."""
    folder = tmp_path_factory.mktemp("plain")
    few = ["--format", "nvfp4", "--calibration", "2", "--steps", "2"]
    done = run_cli("quantize", "tiny-sana", *few, "--container", "bfl", "--json", "-o", "out", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verify picture: ok" in done.stderr
    return folder / "out", json.loads(done.stdout)


def test_every_planned_linear_is_4_bit_and_the_pictures_are_near(plain):
    bundle, document = plain
    figures = document["metrics"]
    assert figures["svdq"] == len(document["layers"]) == 36 and figures["awq"] == figures["rank"] == 0
    assert all(layer["error"] < layer["error_rtn"] * 1.05 for layer in document["layers"])
    assert figures["runtime"] == "emulated" and figures["psnr_quantised_db"] > 30
    table = read_json(bundle / "dcgen_manifest.json")["tensors"]
    marked = {name for name, record in table.items() if record["format"] == "nvfp4"}
    ends = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    held = {layer["module"] for layer in document["layers"]}
    assert {f"{module}.{end}" for module in held for end in ends} <= marked
    assert {name.rpartition(".")[0] for name in marked} == held
    expected, problems = expected_tensors(bundle / "transformer")
    assert not problems and expected.keys() == table.keys()


def test_the_lines_of_its_card_draw_the_picture_of_our_loader(plain, tmp_path):
    """In a new process that imports nothing of ours."""
    bundle, _ = plain
    code = (bundle / "README.md").read_text().partition("```python")[2].partition("```")[0]
    assert "from_single_file" in code and "dcgen" not in code
    code = code.replace('"cuda"', '"cpu"').replace("bfloat16", "float32")
    code = code.replace("BFLQuantizationConfig()", "BFLQuantizationConfig(torch.float32)")
    code = code.replace("num_inference_steps=", "generator=torch.manual_seed(7), num_inference_steps=")
    (tmp_path / "draw.py").write_text(code + f"\nimage.save({str(tmp_path / 'theirs.png')!r})\n")
    subprocess.run([sys.executable, tmp_path / "draw.py"], cwd=bundle.parent, check=True, capture_output=True)
    pipeline, runtime = loading.load(bundle, torch.float32)
    assert runtime == "dequantised"
    call = code.partition("image = pipe(")[2].rpartition(").images")[0]
    image = eval(f"pipeline({call})", {"pipeline": pipeline, "torch": torch}).images[0]
    theirs = numpy.asarray(Image.open(tmp_path / "theirs.png"))
    assert theirs.std() > 5 and numpy.array_equal(numpy.asarray(image), theirs)


def test_sample_runs_diffusers_own_linears_where_it_is_asked_to(plain, tmp_path):
    """On a CPU these multiply the weights out; `auto` does that once, and the emulation rounds the inputs too."""
    drawn = {}
    for runtime in ("stock", "auto", "emulated"):
        document = sample(plain[0], [PROMPT], tmp_path / runtime, NULL, runtime=runtime)
        assert document["runtime"] == ("dequantised" if runtime == "auto" else runtime)
        picture = numpy.asarray(Image.open(document["images"][0]))
        drawn[runtime] = torch.from_numpy(picture.copy())[None].float() / 255
    assert psnr_of([(drawn["stock"], drawn["auto"])], peak=1.0) > 50
    assert 30 < psnr_of([(drawn["emulated"], drawn["auto"])], peak=1.0) < 60


def test_inspect_says_what_it_is_and_export_refuses_it(plain, tmp_path):
    found = inspect(plain[0])
    assert found["quantisation"]["method"] == "bfl" and found["quantisation"]["counts"] == {"nvfp4": 36}
    assert "FlashInfer" in found["runs_on"]
    done = run_cli("export", str(plain[0]), "--to", "comfyui", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_verify_names_a_damaged_linear(plain, tmp_path):
    copy = shutil.copytree(plain[0], tmp_path / "copy")
    tensors = load_file(copy / WEIGHTS)
    lost = next(name for name in tensors if name.endswith("weight_scale"))
    del tensors[lost]
    save_file(tensors, copy / WEIGHTS)
    done = run_cli("verify", "copy", cwd=tmp_path)
    assert done.returncode == 1 and f"transformer: {lost} is missing" in done.stderr


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["tiny-sana", "--format", "int4"], "holds nvfp4 only, not int4"),
        (["tiny-sana", "--calibration", "none"], "needs calibration"),
        (
            ["tiny-sana", "--fuse-qkv"],
            "down projection, and the container bfl has neither",
        ),
    ],
)
def test_refusals_are_one_sentence_and_leave_no_output(tmp_path, arguments, sentence):
    done = run_cli("quantize", *arguments, "--container", "bfl", "-o", "out", cwd=tmp_path)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_evaluate_compares_it_with_its_base(plain, tmp_path):
    drawing = [
        "--count",
        "2",
        "--steps",
        "2",
        "--metrics",
        "sharpness,colour",
        "--offline",
        "--json",
        "--out",
        "measured",
    ]
    done = run_cli("evaluate", str(plain[0]), *drawing, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["schema"] == "dcgen.evaluation/1"


def test_a_conversion_ends_in_it(converted, tmp_path):
    """FLUX with the in-bundle adapter: its modulation stays 16-bit."""
    copy_stages(converted, tmp_path, "merge-1")
    asked = ["--ae", "tiny-dc-ae-f32", "--quantize", "nvfp4", "-o", "bundle", "--run-dir", "run", "-y"]
    asked += short_settings(**{"quantize.container": "bfl"})
    done = run_cli("tiny-flux", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    bundle = tmp_path / "bundle"
    formats = loading.formats_of_bundle(bundle)
    assert set(formats.values()) == {"nvfp4"} and not any(".norm" in name for name in formats)
    sample(bundle, [PROMPT], tmp_path / "drawn", NULL, runtime="stock")
    code = (bundle / "README.md").read_text().partition("```python")[2].partition("```")[0]
    assert "FluxTransformer2DModel.from_single_file" in code and "transformer=transformer" in code


def test_a_loader_that_the_machine_cannot_give_is_named(plain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "compute capability 10.0, this GPU has 9.0" in loading.why_no_kernels(plain[0], torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert "flashinfer-python" in loading.why_no_kernels(plain[0], torch.bfloat16)
    with pytest.raises(InputError, match="does not exist"):
        loading.choose_runtime(plain[0], "none", torch.bfloat16)
