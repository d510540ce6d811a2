"""`dcgen-convert quantize`: a checkpoint that needs no conversion, through the real command."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import WEIGHTS, run_cli
from safetensors import safe_open

from dcgen_convert.bundle import loading

FEW = ["--calibration", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    done = run_cli("quantize", "tiny-flux", *FEW, "--container", "nunchaku", "--json", "-o", "out", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "out", json.loads(done.stdout), done.stderr


def test_every_target_is_quantised_and_the_pictures_are_of_the_catalogues_size(quantised):
    output, document, said = quantised
    assert document["bundle"] == str(output) and document["metrics"]["skipped"] == {}
    assert len(document["layers"]) == document["metrics"]["svdq"] + document["metrics"]["awq"] == 52
    assert "2 pictures of 128 px, 2 steps, guidance 3.5" in said
    assert not list(output.parent.glob(".*.partial"))


def test_the_folder_draws_dequantised(quantised):
    output = quantised[0]
    pipeline, runtime = loading.load(output, torch.float32)
    assert runtime == "dequantised"
    call = dict(height=64, width=128, num_inference_steps=2, max_sequence_length=16, output_type="pt")
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline("a small plain red circle in the center on sand", generator=generator, **call).images
    assert drawn.shape == (1, 3, 64, 128) and drawn.isfinite().all() and drawn.std() > 0.01


def test_the_classic_file_says_the_patch_of_the_stock_model(quantised):
    with safe_open(quantised[0] / "nunchaku.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["comfy_config"])["model_config"]
        assert "transformer_blocks.0.qkv_proj.qweight" in set(file.keys())
    assert (config["patch_size"], config["in_channels"]) == (2, 16)


def test_data_free_draws_nothing(tmp_path):
    done = run_cli("quantize", "tiny-sana", "--calibration", "none", "--format", "int4", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "calibration:" not in done.stderr
    assert loading.is_quantised(tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["tiny-sana", "--container", "nunchaku"], "FLUX.1 only"),
        (["tiny-flux", "--calibration", "0"], "positive whole number"),
        (["tiny-flux", "--rank", "20"], "multiple of 16"),
        (["tiny-flux", "--prompts", "absent.txt", *FEW], "absent.txt does not exist"),
        ([str(WEIGHTS / "tiny-dc-ae-f32")], "model_index.json"),
    ],
)
def test_refusals_are_one_sentence_and_leave_no_output(tmp_path, arguments, sentence):
    done = run_cli("quantize", *arguments, "-o", "out", cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
