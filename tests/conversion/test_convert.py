"""The whole walk by the real command, on the embedded checkpoints: what comes out, resuming, and what must not
change.
"""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import copy_stages, run_cli, short_settings, start_cli

from dcgen_convert.checkpoint.headers import read_weights

FLUX = ["tiny-flux", "--ae", "tiny-dc-ae-f32", "-y"]


def digest(entry):
    with open(entry.file, "rb") as file:
        file.seek(entry.start)
        return hashlib.sha256(file.read(entry.end - entry.start)).hexdigest()


def stages(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in (folder / "run").glob("*/stage.json")}


def test_surgery_replaces_the_named_modules_and_no_other_byte(converted, weights):
    before = read_weights(weights / "tiny-flux" / "transformer")
    after = read_weights(converted / "run" / "surgery" / "transformer")
    assert before.keys() == after.keys()
    changed = {
        name
        for name in before
        if before[name].shape != after[name].shape or digest(before[name]) != digest(after[name])
    }
    assert changed == {"x_embedder.weight", "x_embedder.bias", "proj_out.weight", "proj_out.bias"}
    assert after["x_embedder.weight"].shape == (128, 32) and after["proj_out.weight"].shape == (32, 128)


def test_merge_changes_exactly_the_planned_tensors(converted):
    before = read_weights(converted / "run" / "surgery" / "transformer")
    after = read_weights(converted / "run" / "merge-1" / "transformer")
    changed = {name for name in before if digest(before[name]) != digest(after[name])}
    report = stages(converted)["merge-1"]["metrics"]
    assert report["merged"] == 44 and report["max_delta"] > 0
    assert len(changed) == 44 + 4
    assert not any("norm" in name or ("embedder" in name and not name.startswith("x_embedder")) for name in changed)


def test_alignment_reaches_the_optimum_and_is_reported(converted):
    metrics = stages(converted)["align-embedder"]["metrics"]
    assert metrics["mse_optimum"] <= metrics["mse_after"] <= metrics["mse_optimum"] * 1.001 < metrics["mse_before"]
    assert 0.25 < metrics["mse_heldout"] / metrics["mse_seen"] < 4


def test_every_planned_linear_is_quantised(converted):
    config = json.loads((converted / "bundle" / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "nunchaku_lite" and config["svdq_w4a4"]["precision"] == "nvfp4"
    assert len(config["svdq_w4a4"]["targets"]) == 44
    entries = read_weights(converted / "bundle" / "transformer")
    for target in config["svdq_w4a4"]["targets"]:
        assert entries[f"{target}.wscales"].dtype == "F8_E4M3" and entries[f"{target}.wtscale"].shape == (1,)
    table = json.loads((converted / "bundle" / "dcgen_manifest.json").read_text())["metrics"]["quantize"]["layers"]
    assert [row["module"] for row in table] == config["svdq_w4a4"]["targets"] + config["awq_w4a16"]["targets"]
    assert all(row["error"] < row["error_rtn"] for row in table if row["format"] == "nvfp4")


def test_quality_of_a_quantised_bundle_counts_its_activations_too(converted):
    metrics = stages(converted)["verify"]["metrics"]
    assert metrics["runtime"] in ("emulated", "stock")  # never dequantised: that would be 16-bit activations
    assert metrics["psnr_quantised_db"] > 10 and 0 <= metrics["accuracy_nvfp4"] <= 1


def test_bundle_loads_in_the_stock_pipeline_in_a_fresh_process_and_draws_two_sizes(converted, tmp_path):
    copy_stages(converted, tmp_path, "merge-1")
    arguments = [*FLUX, "-o", "dense", "--run-dir", "run", "--until", "bundle"]
    done = run_cli(*arguments, *short_settings(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    code = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(pipe).__name__ == "FluxPipeline"
for height, width in ((128, 128), (64, 160)):
    image = pipe("a small plain red circle in the center on sand", height=height, width=width, num_inference_steps=2,
                 max_sequence_length=16, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert image.shape == (1, height, width, 3) and numpy.isfinite(image).all() and image.std() > 0.01
"""
    fresh = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "dense")], cwd=tmp_path, capture_output=True, text=True
    )
    assert fresh.returncode == 0, fresh.stderr[-2000:]


def test_second_run_holds_and_a_changed_setting_reruns_only_what_it_touches(converted):
    before = stages(converted)
    arguments = [*FLUX, "--quantize", "nvfp4", "-o", "bundle", "--run-dir", "run"]
    again = run_cli(*arguments, *short_settings(), cwd=converted)
    assert again.returncode == 0 and again.stdout.strip() == str(converted / "bundle")
    assert again.stderr.count("holds, skipped") == len(before)
    other = converted / "copy"
    shutil.copytree(converted / "run", other / "run")
    changed = run_cli(
        *FLUX,
        "-o",
        "bundle",
        "--run-dir",
        "run",
        "--until",
        "align-head",
        *short_settings(**{"align_head.steps": 5}),
        cwd=other,
    )
    assert changed.returncode == 0, changed.stderr[-2000:]
    assert re.search(r"align-head: (continues, from step \d+ on|starts again, changed): align_head\.", changed.stderr)
    assert changed.stderr.count("holds, skipped") == 4
    arguments = ["tiny-flux", "--ae", "tiny-dc-ae-f64", "-o", "bundle", "--run-dir", "run", "--until", "latents"]
    deeper = run_cli(*arguments, *short_settings(), cwd=other)
    assert deeper.returncode == 0, deeper.stderr[-2000:]
    assert "data: holds, skipped" in deeper.stderr, "pictures do not depend on the autoencoder"
    for stage in ("surgery", "latents"):
        assert f"{stage}: starts again, changed: the autoencoder" in deeper.stderr


def test_conditions_encoded_on_the_fly_train_as_cached_ones_do(converted, tmp_path):
    shutil.copytree(converted / "run", tmp_path / "run")
    settings = short_settings(**{"latents.text": "encode"})
    done = run_cli(*FLUX, "-o", "bundle", "--run-dir", "run", "--until", "align-head", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list((tmp_path / "run" / "latents").glob("text-*"))
    cached, encoded = (stages(folder)["align-head"]["metrics"] for folder in (converted, tmp_path))
    assert encoded["loss_start"] == pytest.approx(cached["loss_start"], rel=1e-4)


def test_classic_container_stands_beside_the_same_bundle(converted, tmp_path):
    shutil.copytree(converted / "run", tmp_path / "run")
    settings = short_settings(**{"quantize.container": "nunchaku", "evaluate.prompts": 0})
    arguments = [*FLUX, "--quantize", "nvfp4", "-o", "bundle", "--run-dir", "run", *settings]
    done = run_cli(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    files = json.loads((tmp_path / "bundle" / "dcgen_manifest.json").read_text())["files"]
    assert files["nunchaku.safetensors"]["bytes"] == (tmp_path / "bundle" / "nunchaku.safetensors").stat().st_size
    assert "NunchakuFluxTransformer2dModel" in (tmp_path / "bundle" / "README.md").read_text()


def test_a_run_that_is_interrupted_and_killed_resumes_to_the_same_weights(converted, tmp_path):
    """From the first stage to the end; `test_at_each_stage` has the others."""
    process = start_cli(
        *FLUX, "--quantize", "nvfp4", "-o", "bundle", "--run-dir", "run", *short_settings(), cwd=tmp_path
    )
    started = tmp_path / "run" / "data" / "started.json"
    deadline = time.monotonic() + 120
    while not started.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-2000:]
    assert out == "" and "Traceback" not in err
    assert "dcgen-convert resume" in err.strip().splitlines()[-1]
    for delay in (5.0, 9.0, 6.0):  # at any moment
        process = start_cli("resume", "run", cwd=tmp_path)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    resumed = run_cli("resume", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    same(converted, tmp_path)
    same_files(converted, tmp_path)


def same(reference, folder):
    """Every weight of two bundles has the same bytes."""
    for path in sorted((reference / "bundle").rglob("*.safetensors")):
        other = folder / "bundle" / path.relative_to(reference / "bundle")
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest(), path.name


def same_files(reference, folder):
    """Every file of two bundles has the same bytes, but for the times in the manifest."""
    bundles = [reference / "bundle", folder / "bundle"]
    listed = [{path.relative_to(bundle).as_posix(): path for path in files(bundle)} for bundle in bundles]
    assert listed[0].keys() == listed[1].keys()
    manifest = "dcgen_manifest.json"
    assert [name for name in listed[0] if differs(*(one[name] for one in listed))] == [manifest]
    one, other = (json.loads(each[manifest].read_text()) for each in listed)
    assert one.pop("times") != other.pop("times") and one == other


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def differs(one, other):
    return one.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    ("source", "ae"), [("tiny-sana", "tiny-dc-ae-f64"), ("tiny-dit", "tiny-dc-ae-f32"), ("tiny-flux", "tiny-dc-ae-f64")]
)
def test_other_families_convert_to_a_stock_bundle(converted, tmp_path, source, ae):
    if source == "tiny-flux":  # its pictures are there: they do not depend on the autoencoder
        shutil.copytree(converted / "run" / "data", tmp_path / "run" / "data")
    done = run_cli(
        source, "--ae", ae, "-o", "bundle", "--run-dir", "run", "-y", "--json", *short_settings(), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert document["bundle"] == str(tmp_path / "bundle")
    assert {"accuracy_source", "accuracy_converted", "accuracy_round_trip"} <= document["metrics"].keys()


def test_lora_apart_is_a_file_that_stock_pipelines_load(converted, tmp_path):
    copy_stages(converted, tmp_path, "adapt-1")
    arguments = [*FLUX, "--no-merge-lora", "-o", "bundle", "--run-dir", "run"]
    done = run_cli(*arguments, *short_settings(**{"evaluate.prompts": 0}), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    code = """
import sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.load_lora_weights(sys.argv[1])
print(sum(name.endswith("lora_A.default_0.weight") for name, _ in pipe.transformer.named_parameters()))
"""
    fresh = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bundle")], cwd=tmp_path, capture_output=True, text=True
    )
    assert fresh.returncode == 0, fresh.stderr[-2000:]
    assert fresh.stdout.split()[-1] == "44"
