"""The real command on tiny random models whose conversion has something of its own: every stage, few steps."""

import json

import pytest
from conftest import run_cli

from .tiny_models import TINY

SETTINGS = {
    "data.count": 12,
    "data.steps": 2,
    "data.guidance": 2.5,
    "data.batch": 6,
    "latents.scale_tolerance": 100,  # random models draw no pictures
    "align_head.draws": 1,
    "align_head.steps": 2,
    "align_head.batch": 4,
    "adapt.objective": "flow",
    "adapt.phases.0.steps": 2,
    "adapt.phases.0.batch": 4,
    "adapt.phases.0.rank": 4,
    "bundle.steps": 2,
    "bundle.guidance": 2.5,
    "evaluate.prompts": 2,
    "evaluate.metrics": "none",
}


@pytest.mark.parametrize(
    "name, options, vae",
    [
        ("sd3", ["--set", "latents.normalise=channel"], {"latent_channels": 32, "scaling_factor": 1.0}),
        ("lumina2", [], {"latent_channels": 32}),
        ("qwenimage", ["--ae-channels", "16"], {"latent_channels": 16}),
        ("unet", [], {"latent_channels": 32, "latent_pack": 1, "block_out_channels": [8, 16, 32, 64, 128, 128]}),
    ],
)
def test_convert_aligns_trains_bundles_and_verifies(name, options, vae, tmp_path):
    """SD3: position table and a stock autoencoder with further keys; Lumina2: reversed time, captions in the token
    sequence, p = 4; Qwen-Image: latents with a frame axis and statistics per channel; U-Net: windows for patches, a
    folder of another name.
    Channels of unit RMS and a prefix of them ride along."""
    entry = TINY[name]
    entry.build(tmp_path / "source")
    settings = {**SETTINGS, "latents.text_length": entry.length}
    if name == "unet":
        settings["data.count"] = 24  # 16 windows of 9 x 32 numbers each: more rows than columns
    done = run_cli(
        *(
            str(tmp_path / "source"),
            "--recipe",
            "tiny-flux",
            "--ae",
            "tiny-dc-ae-f32",
            "-o",
            "bundle",
            "--run-dir",
            "run",
            "-y",
            *options,
        ),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stages = {
        path.parent.name: json.loads(path.read_text())["metrics"] for path in (tmp_path / "run").glob("*/stage.json")
    }
    aligned = stages["align-embedder"]
    assert aligned["mse_optimum"] <= aligned["mse_after"] <= aligned["mse_optimum"] * 1.001 < aligned["mse_before"]
    assert stages["align-head"]["loss_start"] < 1e3 and stages["merge-1"]["merged"] > 0
    assert all(check for check in stages["verify"]["checks"])
    config = json.loads((tmp_path / "bundle" / "vae" / "config.json").read_text())
    assert {key: config[key] for key in vae} == vae
    if "scaling_factor" in vae:
        rms = json.loads((tmp_path / "run" / "latents" / "statistics-128.json").read_text())["rms_per_channel"]
        assert rms == pytest.approx([1.0] * 32, rel=1e-2)  # stored weights are rounded to bfloat16
