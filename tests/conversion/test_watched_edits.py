"""Measures of the sample grids of a model that edits, inside a real training: the references go along."""

import json

import pytest
from conftest import SHORT
from families.tiny_models import TINY
from PIL import Image

from dcgen_convert.conversion import convert
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.journal import Run
from dcgen_convert.core.pixels import to_image
from dcgen_convert.evaluation import tiny_edits
from dcgen_convert.evaluation.pixels import from_images
from dcgen_convert.networks import autoencoders
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages.job import prepare

SIDE, PICTURES = 64, 2
CHANGES = {
    "data.prompts": "tiny-edits",
    "data.count": 40,
    "data.resolution": SIDE,
    "data.steps": 1,
    "adapt.phases.0.resolution": SIDE,
    "adapt.phases.0.steps": 2,
    "adapt.phases.0.batch": 4,
    "align_head.steps": 0,
    "latents.scale_tolerance": 1000,
    "bundle.steps": 1,
    "watch.grid_every": 2,
    "watch.pictures": PICTURES,
    "watch.metrics": "[edit-accuracy, preservation]",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(job, folder of the phase, log)."""
    root = tmp_path_factory.mktemp("watched-edits")
    TINY["flux-kontext"].build(root / "source")
    flags = {"source": str(root / "source"), "ae": "tiny-dc-ae-f32"}
    resolved = load("tiny-flux", sets=[f"{key}={value}" for key, value in {**SHORT, **CHANGES}.items()], flags=flags)
    console = Console("quiet", log_file=root / "log.txt")
    convert(resolved, root / "run", root / "bundle", console, until="adapt-1")
    return prepare(resolved, Run(root / "run", NULL), NULL), root / "run" / "adapt-1", (root / "log.txt").read_text()


def test_the_measures_see_what_was_edited(trained):
    """The line of the round trips by hand, from the latents of the rows that were kept apart."""
    job, folder, log = trained
    lines = [json.loads(line) for line in (folder / "measures.jsonl").read_text().splitlines()]
    found = {line["measure"]: line for line in lines}
    assert list(found) == ["edit-accuracy", "preservation", "sharpness", "colour"]
    rows = job.rows(SIDE).split()[1]
    z0, text = rows.batch(range(PICTURES))
    codec = autoencoders.load(job.target)
    trips, sources = (from_images([to_image(pixels) for pixels in codec.decode(z)]) for z in (z0, text["reference"]))
    texts = rows.captions(range(PICTURES))
    kept = tiny_edits.kept(trips, sources, texts).nanmean().item()
    assert found["preservation"]["round_trip"] == pytest.approx(kept)
    assert found["edit-accuracy"]["round_trip"] == tiny_edits.changed(trips, texts).mean().item()
    assert "gain" in found["edit-accuracy"] and "gain" not in found["preservation"]
    assert "adapt-1: after step 2, 2 pictures: edit-accuracy" in log


def test_the_sheet_begins_with_what_is_edited(trained):
    job, folder, _ = trained
    sheet = Image.open(folder / "samples" / "step-000002.png")
    assert sheet.width == 4 + 3 * 196
    rows = job.rows(SIDE).split()[1]
    reference = rows.batch([0])[1]["reference"]
    wanted = to_image(autoencoders.load(job.target).decode(reference)[0]).resize((192, 192), Image.Resampling.BICUBIC)
    cells = [from_images([sheet.crop((4 + 196 * x, 32, 196 + 196 * x, 224))]) for x in range(3)]
    apart = [(cell - from_images([wanted])).square().mean().item() for cell in cells]
    assert apart[0] < 1e-3 < min(apart[1:])
