"""`dcgen-convert quantize`: a checkpoint that needs no conversion, through the real command."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import WEIGHTS, run_cli
from safetensors import safe_open

from dcgen_convert.api.order import quantisation
from dcgen_convert.bundle import loading
from dcgen_convert.bundle.inspection import inspect
from dcgen_convert.bundle.sample import sample
from dcgen_convert.bundle.verify import verify
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.quantization import Drawing, Request, quantize_source

CHECKS = ["files", "code", "structure", "tensors", "table", "parts", "against", "picture"]
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
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_the_result_is_a_verified_bundle_with_manifest_and_card(quantised):
    """Checked by the verb itself, its picture in a fresh process included, and by `verify` again against the
    source's name.
    """
    output, document, said = quantised
    assert document["checks"] == CHECKS and "verify picture: ok (64 x 64 px, dequantised runtime)" in said
    checked = verify(output, NULL, "tiny-flux", probe=False)
    record = read_json(output / "dcgen_manifest.json")
    table = record["tensors"].items()
    kept = sum(row["format"] == "dense" or (row["format"] == "awq" and name.endswith(".bias")) for name, row in table)
    assert checked["tensors"]["identical"] == kept < checked["tensors"]["total"]
    assert record["sources"]["base"]["files"]["transformer/config.json"] and record["layout"] == "source"
    assert record["defaults"] == {"height": 128, "width": 128, "steps": 2, "guidance": 3.5, "text_length": 16}
    assert [layer["module"] for layer in record["metrics"]["quantize"]["layers"]] == [
        x["module"] for x in document["layers"]
    ]
    assert record["pictures"]["columns"] == ["this model in 16 bits", "this bundle (NVFP4)"]
    assert len(record["pictures"]["prompts"]) == 4 and "pictures.png" in record["files"]
    assert record["metrics"]["verify"] == {"psnr_quantised_db": document["metrics"]["psnr_quantised_db"],
                                           "runtime": "emulated"}  # fmt: skip
    assert 25 < document["metrics"]["psnr_quantised_db"] < 60  # four times the noise of one layer would be below
    card = (output / "README.md").read_text()
    assert "pictures.png" in card and "16 bits" in card
    assert "license: apache-2.0" in card and "converted to" not in card and "trust_remote_code" not in card
    assert 'DiffusionPipeline.from_pretrained("out", dtype=torch.bfloat16)' in card and "height=128, width=128" in card
    found = inspect(output)
    assert (found["kind"], found["family"], found["made_from"]) == ("bundle", "flux", {"base": "tiny-flux"})
    assert found["quantisation"]["counts"] == {"nvfp4": document["metrics"]["svdq"], "awq": document["metrics"]["awq"]}


def test_it_is_sampled_in_multiples_of_its_own_tokens(quantised, tmp_path):
    """f8 and 2 x 2 latents per token: 16 px."""
    drawn = sample(
        quantised[0], ["a small plain red circle in the center on sand"], tmp_path, NULL, height=80, width=64
    )
    assert (drawn["runtime"], drawn["steps"], drawn["height"]) == ("dequantised", 2, 80)
    with pytest.raises(InputError, match="not a multiple of 16 px"):
        sample(quantised[0], ["a"], tmp_path, NULL, height=72)


def test_a_layer_missing_in_the_config_is_found(quantised, tmp_path):
    copy = shutil.copytree(quantised[0], tmp_path / "copy")
    config = read_json(copy / "transformer" / "config.json")
    lost = config["quantization_config"]["svdq_w4a4"]["targets"].pop()
    write_json(copy / "transformer" / "config.json", config)
    with pytest.raises(CheckFailed) as caught:
        verify(copy, NULL, probe=False)
    assert "transformer/config.json has" in caught.value.message and lost in caught.value.message


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
    assert "calibration:" not in done.stderr and "verify picture: ok" in done.stderr
    assert loading.is_quantised(tmp_path / "out")
    layers = read_json(tmp_path / "out" / "dcgen_manifest.json")["metrics"]["quantize"]["layers"]
    assert all("weight_error" in layer and "error" not in layer for layer in layers)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["tiny-sana", "--container", "nunchaku"], "FLUX.1 only"),
        (["tiny-flux", "--calibration", "0"], "positive whole number"),
        (["tiny-flux", "--rank", "20"], "multiple of 16"),
        (["tiny-flux", "--resolution", "100"], "not a multiple of 16 px"),
        (["tiny-flux", "--prompts", "absent.txt", *FEW], "absent.txt does not exist"),
        ([str(WEIGHTS / "tiny-dc-ae-f32")], "model_index.json"),
    ],
)
def test_refusals_are_one_sentence_and_leave_no_output(tmp_path, arguments, sentence):
    done = run_cli("quantize", *arguments, "-o", "out", cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def request(name, output, *, calibration: int | None = None, **section) -> Request:
    asked = quantisation("int4", 16, calibration, None, section.get("container", "diffusers"), False)
    return Request(str(name), output, asked, Drawing(calibration is None, steps=1))


def test_a_transformer_alone_needs_nothing_else_without_calibration(tmp_path):
    """No base is named, the suite is offline, and no published one is asked for."""
    folder = shutil.copytree(WEIGHTS / "tiny-sana" / "transformer", tmp_path / "transformer")
    made = quantize_source(request(folder, tmp_path / "out"), NULL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "transformer"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["transformer"] and made["checks"] == ["tensors"]
    assert inspect(tmp_path / "out" / "transformer")["quantisation"]["counts"]["int4"] == made["metrics"]["svdq"] > 0
    with pytest.raises(InputError, match="already quantised"):
        quantize_source(request(tmp_path / "out" / "transformer", tmp_path / "again"), NULL)
    assert not (tmp_path / "again").exists()


def test_the_classic_container_is_refused_without_calibration_before_the_work(tmp_path):
    with pytest.raises(InputError, match="needs calibration"):
        quantize_source(request("tiny-flux", tmp_path / "out", container="nunchaku"), NULL)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_authors_layout_is_refused_by_its_name(tmp_path):
    folder = shutil.copytree(WEIGHTS / "tiny-flux", tmp_path / "official")
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"_class_name": "DCGen_FluxPipeline"})
    with pytest.raises(InputError, match="layout of the DC-Gen authors"):
        quantize_source(request(folder, tmp_path / "out"), NULL)
    assert not (tmp_path / "out").exists()
