"""A folder of pictures of several shapes, through the real command to a bundle: what the cache holds, what the heads
were fitted to.
"""

import json

import pytest
import torch
from conftest import WEIGHTS, run_cli, short_settings
from PIL import Image, ImageOps

from dcgen_convert.core import names
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import Run
from dcgen_convert.data.images import to_image
from dcgen_convert.networks import autoencoders, models
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages.align_embedder import Problem, affine, descend, xavier
from dcgen_convert.stages.align_head import fit_head
from dcgen_convert.stages.job import prepare
from dcgen_convert.tiny import world
from dcgen_convert.train.phases import Task

SHAPES = {(160, 240): 10, (240, 160): 9, (128, 128): 8, (64, 248): 2}  # height, width: pictures
ASSIGNED = {(160, 240): (96, 160), (240, 160): (160, 96), (128, 128): (128, 128), (64, 248): (64, 256)}
COUNT = sum(SHAPES.values())
SETTINGS = {
    "data.buckets": "on",
    "data.min_side": 1,
    "adapt.phases.0.batch": 4,
    "align_head.batch": 4,
    "latents.batch": 4,
    "adapt.phases.0.steps": 12,  # 8 batches of training rows an epoch, so that every shape comes
    "watch.evaluate_every": 6,
    "watch.grid_every": 12,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with pictures/, bundle and run; the pictures' shapes come in no order."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "pictures").mkdir()
    labels = world.sample_labels(COUNT, 7)
    shapes = [shape for shape, count in SHAPES.items() for _ in range(count)]
    mixed = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)).tolist()
    for i, pixels in enumerate(world.draw(labels, 7, 256)):
        height, width = shapes[mixed[i]]
        to_image(pixels[:, :height, :width]).save(root / "pictures" / f"{i:03d}.png")
        (root / "pictures" / f"{i:03d}.txt").write_text(world.caption(labels[i].tolist()))
    arguments = [
        "tiny-flux",
        "--ae",
        "tiny-dc-ae-f32",
        "-o",
        "bundle",
        "--run-dir",
        "run",
        "-y",
        "--data",
        "pictures",
        "--until",
        "bundle",
    ]
    done = run_cli(*arguments, *short_settings(**SETTINGS), cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pictures by height x width: 256x" not in done.stderr and "96x160 10" in done.stderr
    return root


@pytest.fixture(scope="module")
def job(folder):
    record = json.loads((folder / "run" / "recipe.json").read_text())
    return prepare(Resolved(Recipe.model_validate(record["recipe"]), {}), Run(folder / "run", NULL), NULL)


def test_every_latent_is_the_autoencoder_of_its_own_pictures_crop(folder, job):
    """Crops by Pillow, one at a time, through both autoencoders; atol 2e-4 (batches of 4 there). Captions go with
    their pictures.
    """
    codecs = {
        "base": autoencoders.load(WEIGHTS / "tiny-flux" / "vae"),
        "target": autoencoders.load(WEIGHTS / "tiny-dc-ae-f32"),
    }
    rows, files = (
        job.rows(128),
        {path.with_suffix(".txt").read_text(): path for path in (folder / "pictures").glob("*.png")},
    )
    assert len(files) == COUNT == len(rows)
    seen = {}
    for span, shape in zip(rows.spans, rows.shapes, strict=True):
        for row in span:
            image = Image.open(files[rows.captions([row])[0]])
            height, width = ASSIGNED[image.height, image.width]
            assert shape[1:] == (height // 32, width // 32)
            crop = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
            pixels = (
                torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8)
                .view(1, height, width, 3)
                .permute(0, 3, 1, 2)
            )
            for name, latents in zip(("base", "target"), (found["z"] for found in rows.pairs([row])), strict=True):
                torch.testing.assert_close(latents, codecs[name].encode(pixels / 127.5 - 1), atol=2e-4, rtol=1e-3)
            seen[image.size] = seen.get(image.size, 0) + 1
    assert seen == {(width, height): count for (height, width), count in SHAPES.items()}
    training, held_out = rows.split()
    assert len(held_out) == 1 and held_out.captions([0])[0] not in training.captions(range(len(training)))
    assert sum(map(len, training.spans)) == len(training) == COUNT - 1


def test_index_holds_spans_and_the_key_names_the_buckets(folder, job):
    index = json.loads((folder / "run" / "latents" / "index.json").read_text())
    assert len(index["spans"]["128"]) <= len(SHAPES)
    inputs = {
        stage: json.loads((folder / "run" / stage / "stage.json").read_text())["inputs"]
        for stage in ("data", "latents")
    }
    assert "data.buckets" not in inputs["data"] and inputs["latents"]["data.buckets"] is True
    sides = [[256, 64], [224, 64], [192, 64], [160, 96], [128, 128], [96, 160], [64, 192], [64, 224], [64, 256]]
    assert index["key"]["buckets"]["128"] == sides
    squares = job.recipe.model_copy(update={"data": job.recipe.data.model_copy(update={"buckets": False})})
    other = prepare(Resolved(squares, {}), Run(folder / "run", NULL), NULL)
    assert "buckets" not in other.latents_key
    with pytest.raises(InputError, match=r"made from something else: buckets"):
        other.rows(128)


def test_embedder_is_fitted_to_all_shapes(folder, job):
    """Moments of the regression against those of single pictures through average pooling by hand; rel. 1e-5."""
    teacher = models.load(job.source.transformer, torch.float32)
    student = models.load(job.folders.surgery / models.TRANSFORMER, torch.float32)
    rows = job.rows(128)
    problem = Problem(job, teacher, student, rows, "average")
    equations = problem.equations(4)
    inputs, goals = [], []
    for row in range(len(rows)):
        base, deep = (found["z"] for found in rows.pairs([row]))
        tokens = affine(teacher.x_embedder, job.family.tokens(base, 2)).detach()
        maps = tokens.view(base.shape[2] // 2, base.shape[3] // 2, -1).permute(2, 0, 1)
        goals.append(torch.nn.functional.avg_pool2d(maps, 2).flatten(1).T.double())
        inputs.append(deep.flatten(2)[0].T.double())
    x, y = torch.cat(inputs), torch.cat(goals)
    assert equations.count == len(x) == 10 * 15 + 9 * 15 + 8 * 16 + 2 * 16
    torch.testing.assert_close(equations.xx, x.T @ x, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(equations.xy, x.T @ y, rtol=1e-5, atol=1e-3)

    start = xavier(student.x_embedder, 0)
    weight, bias = (torch.nn.Parameter(value.clone()) for value in start)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):  # the published way on batches of any shapes, by hand
        drawn = torch.randint(len(rows), (6,), generator=generator).tolist()
        optimizer.zero_grad()
        errors = inputs_of(drawn, inputs) @ weight.T + bias - inputs_of(drawn, goals)
        errors.square().mean().backward()
        optimizer.step()
    descended = descend(problem, start, 4, 1e-2, 6, 3)
    torch.testing.assert_close(descended, (weight.detach(), bias.detach()), rtol=1e-4, atol=1e-5)


def inputs_of(rows, table):
    return torch.cat([table[row] for row in rows]).float()


def test_head_is_fitted_to_every_token_of_the_training_rows(folder, job, tmp_path):
    training, held_out = job.rows(128).split()
    model = models.load(
        job.folders.surgery / models.TRANSFORMER, torch.float32, job.folders.align_embedder / names.MODULES
    )
    task = Task(model, job.family, job.recipe.adapt, training, job.scheduler)
    tokens = sum(len(span) * shape[1] * shape[2] for span, shape in zip(training.spans, training.shapes, strict=True))
    assert fit_head(job, task, held_out, tmp_path)[-1]["rows"] == tokens


def test_run_trained_on_every_shape_and_drew_its_grid(folder):
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "adapt-1" / "metrics.jsonl").read_text().splitlines()]
    words = 16
    tokens = {round(line["tokens_per_s"] / line["samples_per_second"]) - words for line in lines}
    assert len(lines) == 12 and tokens == {15, 16}
    assert [json.loads(line)["step"] for line in (run / "adapt-1" / "evaluations.jsonl").read_text().splitlines()] == [
        6,
        12,
    ]
    assert (run / "adapt-1" / "samples" / "step-000012.png").exists()
    assert len(json.loads((run / "merge-1" / "stage.json").read_text())["metrics"]["gap"]) == 6  # blocks
    assert (folder / "bundle" / "dcgen_manifest.json").exists()
