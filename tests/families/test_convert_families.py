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


@pytest.mark.parametrize("name", ["sd3", "lumina2", "qwenimage"])
def test_convert_aligns_trains_bundles_and_verifies(name, tmp_path):
    """SD3: position table and a stock autoencoder with further keys; Lumina2: reversed time, captions in the token sequence,
    p = 4; Qwen-Image: latents with a frame axis and statistics per channel."""
    entry = TINY[name]
    entry.build(tmp_path / "source")
    settings = {**SETTINGS, "latents.text_length": entry.length}
    done = run_cli(
        *(str(tmp_path / "source"), "--recipe", "tiny-flux", "--ae", "tiny-dc-ae-f32", "-o", "bundle", "--run-dir", "run", "-y"),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stages = {path.parent.name: json.loads(path.read_text())["metrics"] for path in (tmp_path / "run").glob("*/stage.json")}
    aligned = stages["align-embedder"]
    assert aligned["mse_optimum"] <= aligned["mse_after"] <= aligned["mse_optimum"] * 1.001 < aligned["mse_before"]
    assert stages["align-head"]["loss_start"] < 1e3 and stages["merge-1"]["merged"] > 0
    assert all(check for check in stages["verify"]["checks"])
