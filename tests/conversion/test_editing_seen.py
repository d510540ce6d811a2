"""Models whose text encoder sees the references: every row has a condition of its own, stored or encoded in each step.

The pipeline is tiny, and gives a reference 256 x 256 px instead of a megapixel. Everything runs in this process.
"""

import json

import pytest
import torch
from bundle.conftest import modules_cache  # noqa: F401 (a fixture)
from conftest import short_settings
from families.tiny_models import TINY
from families.tiny_parts import small_references
from PIL import Image
from safetensors.torch import load_file

from dcgen_convert.bundle.sample import sample
from dcgen_convert.conversion import convert
from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import read_json
from dcgen_convert.core.journal import Found, Run, Wanted
from dcgen_convert.core.pixels import to_image
from dcgen_convert.data import images
from dcgen_convert.families.base import NULL as EMPTY
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import depends, latents, pictures
from dcgen_convert.stages.job import prepare

SIDE, COUNT = 64, 4
COLOURS = ["red", "teal", "navy", "gold"]
SETS = ["latents.scale_tolerance=1000", "latents.batch=2", "latents.text_length=64", "data.min_side=1", "dtype=fp32"]


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        small_references(patch)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit") / "source"
    TINY["qwenimage-edit"].build(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (SIDE + 40 * number, SIDE), colour).save(folder / f"{number}.png")
        Image.linear_gradient("L").rotate(90 * number).resize((120, 90)).convert("RGB").save(folder / f"{colour}.png")
        lines.append(json.dumps({"file": f"{number}.png", "source": f"{colour}.png", "caption": f"edit {number % 2}"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def encoded(source, rows, run, *sets):
    """The job, and its rows after the stages data and latents."""
    flags = {"ae": "tiny-dc-ae-f32", "resolution": SIDE, "data.path": str(rows), "data.kind": "folder"}
    job = prepare(load(str(source), sets=[*SETS, *sets], flags=flags, recipe="image"), Run(run, NULL), NULL)
    for name, work in (("data", pictures.run), ("latents", latents.run)):
        with job.run.stage(Wanted(name, depends.inputs(job, name)), Found("nothing")) as stage:
            work(job, stage)
    return job, job.rows(SIDE)


@pytest.mark.parametrize("sets", [[], ["data.buckets=true"]], ids=["squares", "buckets"])
def test_each_row_has_the_conditions_of_its_own_picture(sets, source, rows, tmp_path):
    """Those of its prompt and its picture alone, cut as the latents are: stored, and encoded in a step; to 1e-5."""
    job, stored = encoded(source, rows, tmp_path / "stored", "latents.text=cache", *sets)
    other, fresh = encoded(source, rows, tmp_path / "fresh", *sets)
    assert other.recipe.latents.text == "encode" and not list(other.folders.latents.glob("text-*"))
    assert stored.null == fresh.null == {}
    encoders, seen = pipelines.load_text_encoders(job.source, torch.float32), []
    listed = images.read_index(job.folders.latents / images.ROWS, job.pictures_root)
    for span, shape in zip(stored.spans, stored.shapes, strict=True):
        both = [cache.batch(list(span))[1] for cache in (stored, fresh)]
        for place, row in enumerate(span):
            pixels = images.read_pixels(listed[row].references[0], *(32 * side for side in shape[1:]))
            given = [[to_image(pixels)]]
            alone = pipelines.encode_text(job.family, encoders, [listed[row].caption], 64, given)
            assert {EMPTY + key for key in job.family.text_keys} < set(alone)
            for found in both:
                for key, value in alone.items():
                    torch.testing.assert_close(found[key][place], value[0], atol=1e-5, rtol=1e-5)
            seen.append(alone["encoder_hidden_states"])
    assert len(seen) == COUNT
    assert all((seen[i] - seen[j]).abs().max() > 1e-3 for i in range(COUNT) for j in range(i))


def test_a_conversion_ends_with_a_bundle_that_edits(source, rows, tmp_path):
    """Every stage up to the bundle, with the text encoders beside the training; then `sample --image`."""
    changes = {
        "adapt.phases.0.resolution": SIDE,
        "adapt.phases.0.batch": 2,
        "adapt.phases.0.steps": 2,
        "adapt.objective": "flow",
        "align_head.steps": 0,
        "latents.text": "encode",
        "watch.grid_every": 2,
        "watch.pictures": 1,
        "bundle.steps": 2,
        "evaluate.metrics": "none",
    }
    sets = [value for value in short_settings(**changes) if value != "--set"]
    flags = {"source": str(source), "ae": "tiny-dc-ae-f32", "data.path": str(rows), "data.kind": "folder"}
    wanted = load("tiny-flux", sets=[*SETS, *sets], flags=flags)
    convert(wanted, tmp_path / "run", tmp_path / "bundle", NULL, until="bundle")
    assert list((tmp_path / "run" / "adapt-1" / "samples").glob("*.png"))
    assert load_file(tmp_path / "run" / "latents" / "null-00000.safetensors") == {}
    index = read_json(tmp_path / "bundle" / "model_index.json")
    assert index["_class_name"] == "QwenImageEditPipeline" and index["processor"][1] == "Qwen2VLProcessor"
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "accelerate torchvision`" in card
    assert "every reference the area of 256 x 256 px" in card
    Image.new("RGB", (90, 60), "teal").save(tmp_path / "photo.png")
    done = sample(tmp_path / "bundle", ["make it red"], tmp_path / "drawn", NULL, images=[tmp_path / "photo.png"])
    assert Image.open(done["images"][0]).size == (SIDE, SIDE)
