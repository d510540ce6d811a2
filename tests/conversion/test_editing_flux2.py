"""FLUX.2 klein through the real command, from rows with no reference, one and two; its bundle draws and edits.

The model is random; what is looked at is where the references go. They have other shapes than the pictures.
"""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import run_cli, short_settings
from families.tiny_models import TINY
from PIL import Image

from dcgen_convert.bundle.loading import load
from dcgen_convert.core.console import NULL
from dcgen_convert.core.journal import Run
from dcgen_convert.families.base import references_of
from dcgen_convert.networks import autoencoders
from dcgen_convert.planning import plan
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.loading import load as resolved
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages import captions, edited, pictures
from dcgen_convert.stages.job import prepare

COUNT, SIDE = 12, 64
SETTINGS = {
    "adapt.phases.0.resolution": SIDE,
    "adapt.phases.0.batch": 2,
    "adapt.phases.0.steps": 6,
    "align_head.steps": 0,
    "latents.batch": 4,
    "latents.scale_tolerance": 1000,
    "latents.text_length": TINY["flux2-klein"].length,
    "watch.grid_every": 6,
    "watch.pictures": 1,
    "bundle.steps": 2,
    "evaluate.metrics": "none",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("klein") / "source"
    TINY["flux2-klein"].build(folder)
    return folder


def write_rows(folder, counts):
    """Picture n was made from ``counts[n]`` others."""
    random = np.random.default_rng(3)
    lines = []
    for number, count in enumerate(counts):
        names = [f"{number}.png", *(f"{number}-{place}.png" for place in range(count))]
        for name, (height, width) in zip(names, [(SIDE, SIDE), (80, 100), (120, 70)], strict=False):
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        lines.append(json.dumps({"file": names[0], "caption": f"picture {number}", "source": names[1:]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"), [number % 3 for number in range(COUNT)])


@pytest.fixture(scope="module")
def folder(source, rows, tmp_path_factory):
    """Folder with bundle and run."""
    root = tmp_path_factory.mktemp("edited")
    arguments = [str(source), "--recipe", "tiny-flux", "--ae", "tiny-dc-ae-f32", "-o", "bundle", "--run-dir", "run"]
    done = run_cli(*arguments, "-y", "--data", str(rows), *short_settings(**SETTINGS), cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def test_one_data_set_trains_to_draw_and_to_edit(folder):
    """12 rows: 4 of each number. Training and closed forms pass over all of them."""
    record = json.loads((folder / "run" / "recipe.json").read_text())
    job = prepare(Resolved(Recipe.model_validate(record["recipe"]), {}), Run(folder / "run", NULL), NULL)
    cache = job.rows(SIDE)
    assert [len(span) for span in cache.spans] == [4, 4, 4]
    assert [len(references_of(cache.batch(list(span))[1])) for span in cache.spans] == [0, 1, 2]
    data = json.loads((folder / "run" / "data" / "stage.json").read_text())["metrics"]
    assert (data["references"], data["with_references"]) == (2, 8)
    assert captions.others(job, 2, 5) and not edited.of_prompts(edited.judging(job), 2, 5, folder)  # it draws too
    card = (folder / "bundle" / "README.md").read_text()
    assert "Trained with up to 2 pictures beside the text" in card and "untested" not in card


def test_the_bundle_edits_in_the_stock_pipeline(folder, rows):
    """`Flux2KleinPipeline(image=[...])` encodes the pictures with the deep autoencoder: inputs of the embedder to
    1e-4. Their order matters, and so does each.
    """
    pipeline, _ = load(folder / "bundle", torch.float32, trust_remote_code=True)
    assert type(pipeline) is diffusers.Flux2KleinPipeline
    codec, seen = autoencoders.load(folder / "bundle" / "vae"), []
    pipeline.transformer.x_embedder.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    given = [Image.open(rows.parent / f"2-{place}.png").resize(size) for place, size in ((0, (96, 64)), (1, (64, 96)))]

    def drawn(*pictures):
        seen.clear()
        call = dict(prompt="picture 2", height=SIDE, width=SIDE, num_inference_steps=2, max_sequence_length=96)
        found = pipeline(
            **call, image=[*pictures] or None, generator=torch.Generator().manual_seed(1), output_type="pt"
        )
        return found.images, seen[0]

    both, tokens = drawn(*given)
    pixels = [torch.from_numpy(np.array(one)).permute(2, 0, 1)[None] / 127.5 - 1 for one in given]
    wanted = [codec.encode(one).flatten(2).transpose(1, 2) for one in pixels]  # a token holds the channels of a cell
    assert tokens.shape[1] == 4 + 6 + 6
    torch.testing.assert_close(tokens[:, 4:], torch.cat(wanted, dim=1), atol=1e-4, rtol=1e-4)
    others = [drawn(*given[::-1])[0], drawn(given[0])[0], drawn()[0]]
    assert all((both - other).abs().max() > 1e-3 for other in others) and torch.isfinite(both).all()


def test_sample_takes_several_pictures_or_none(folder, rows):
    def drawn(place, *names):
        given = [part for name in names for part in ("--image", str(rows.parent / name))]
        done = run_cli("sample", "bundle", "-p", "picture 2", "-o", place, *given, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        return np.array(Image.open(next((folder / place).glob("*.png"))))

    found = [
        drawn("none"),
        drawn("one", "2-0.png"),
        drawn("two", "2-0.png", "2-1.png"),
        drawn("turned", "2-1.png", "2-0.png"),
    ]
    assert all(picture.shape == (SIDE, SIDE, 3) for picture in found)
    assert all(not np.array_equal(one, other) for n, one in enumerate(found) for other in found[:n])
    many = [part for _ in range(7) for part in ("--image", str(rows.parent / "2-0.png"))]
    done = run_cli("sample", "bundle", "-p", "picture 2", *many, cwd=folder)
    assert done.returncode == 2 and "at most 6 pictures, not 7" in done.stderr


def new_job(source, run, rows):
    flags = {"source": str(source), "ae": "tiny-dc-ae-f32", "resolution": SIDE, "data.kind": "folder"}
    flags["data.path"] = str(rows)
    return prepare(resolved("image", sets=["data.min_side=1"], flags=flags), Run(run, NULL), NULL)


def test_it_is_tried_with_edits_where_every_row_is_one(source, tmp_path):
    rows = write_rows(tmp_path, [1, 2, 1, 2])
    job = new_job(source, tmp_path / "run", rows)
    pictures.require(job)
    texts = captions.others(job, 4, 5)
    files = edited.of_prompts(edited.judging(job), 4, 5, tmp_path)
    counts = [len(own) for own in files]
    assert counts == [1 + int(text.split()[1]) % 2 for text in texts] and sorted(counts) == [1, 1, 2, 2]


@pytest.mark.parametrize("count", [0, 2])
def test_a_plan_says_whether_editing_is_trained_and_prices_it(count, source, tmp_path):
    rows = write_rows(tmp_path, [0, 0, count])
    flags = {"source": str(source), "ae": "tiny-dc-ae-f32", "resolution": SIDE, "data.kind": "folder"}
    found = plan.plan(resolved("image", sets=["data.min_side=1"], flags=flags | {"data.path": str(rows)}))
    assert any("edits with the converted model are untested" in note for note in found["notes"]) == (not count)
    assert any("up to 2 references of its size" in note for note in found["notes"]) == bool(count)


@pytest.mark.parametrize(
    "sets, edits",
    [
        ([], False),
        (["data.prompts=TEXTS"], False),
        (["data.prompts=TEXTS", "data.sources=BEFORE"], True),
        (["data.prompts=tiny-edits"], True),
    ],
)
def test_the_base_draws_edits_where_it_is_given_pictures_to_edit(sets, edits, source, tmp_path):
    """And the plan prices their references."""
    (tmp_path / "texts.txt").write_text("make it red\nmake it blue")
    (tmp_path / "before").mkdir()
    Image.new("RGB", (80, 80), "teal").save(tmp_path / "before" / "a.png")
    names = {"TEXTS": str(tmp_path / "texts.txt"), "BEFORE": str(tmp_path / "before")}
    sets = ["=".join(names.get(part, part) for part in text.split("=")) for text in [*sets, "data.count=2"]]
    recipe = resolved("image", sets=sets, flags={"source": str(source), "ae": "tiny-dc-ae-f32", "resolution": SIDE})
    assert shapes_of(recipe.recipe, recipe.identity).references == int(edits)
    job = prepare(recipe, Run(tmp_path / "run", NULL), NULL)
    pictures.require(job)
    assert [len(picture.references) for picture in pictures.intended(job)] == [int(edits)] * 2
