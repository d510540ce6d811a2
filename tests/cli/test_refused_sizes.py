"""Recipes whose sizes cannot work: recipes validate, plan and convert say the same, with exit 2, and write nothing."""

import pytest
import yaml
from conftest import run_cli

SIDES = [{"resolution": side, "steps": 60} for side in (1024, 2048, 4096)]
DRAWN = {"kind": "synthetic", "resolution": 4096}
REFUSED = {
    "drawn at 4096 px": (
        {"extends": "flux-krea", "data": DRAWN, "adapt": {"shift": "model", "phases": SIDES[2:]}},
        "data.resolution is 4096 px, but flux-krea was trained to draw pictures of up to 1414 px",
        "its scheduler would use mu 11.55",
    ),
    "drawn at 4096 px for the last phase alone": (
        {"extends": "flux-krea", "adapt": {"shift": "model", "phases": [SIDES[0], {**SIDES[2], "data": DRAWN}]}},
        "adapt.phases.1.data.resolution is 4096 px",
        "mu 11.55",
    ),
    "a miniature at 256 px": (
        {"extends": "tiny-flux", "data": {"resolution": 256}, "adapt": {"phases": [{"resolution": 256, "steps": 60}]}},
        "tiny-flux was trained to draw pictures of up to 128 px, 64 image tokens",
        "mu 0.63, after at most 0.50",
    ),
    "flux2 with three sizes": (
        {"extends": "flux-krea", "data": {"kind": "folder", "path": "."}, "adapt": {"shift": "flux2", "phases": SIDES}},
        "adapt.shift is flux2, which cannot be written for the 3 sizes 1024, 2048, 4096 px",
        "--set adapt.shift=model",
    ),
    "no pictures": (
        {"extends": "flux-krea-4k"},
        "adapt.phases.0 (2048 px) and adapt.phases.1 (4096 px) need pictures of your own",
        "give --data FOLDER",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_three_verbs_refuse_the_same(case, tmp_path):
    values, *words = REFUSED[case]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(values))
    found = [
        run_cli(*verb, "mine.yaml", cwd=tmp_path) for verb in (("recipes", "validate"), ("plan",), ("convert", "-y"))
    ]
    assert [done.returncode for done in found] == [2, 2, 2]
    assert len({done.stderr for done in found}) == 1 and all(word in found[0].stderr for word in words)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
