"""The target home: what the base sees, what the latents hold for it, and what the embedder and the gap make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from dcgen_convert import conversion
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.core.journal import Run
from dcgen_convert.data.images import to_image
from dcgen_convert.networks import autoencoders, models
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import align_embedder, gap
from dcgen_convert.stages.job import Job, prepare
from dcgen_convert.tiny import world

SHAPES = {(256, 256): 3, (150, 250): 3}  # height, width: pictures
HOME = {(256, 256): (128, 128), (192, 320): (96, 160)}  # of the buckets at 256 px
SETTINGS = {
    "data.buckets": "true",
    "data.min_side": 150,
    "adapt.phases": "[{resolution: 256, steps: 1}, {resolution: 128, steps: 1}]",
    "latents.batch": 2,
    "latents.scale_tolerance": 0.9,
}


def resolved(folder: Path, *sets: str):
    flags = {"data.kind": "folder", "data.path": str(folder / "pictures")}
    return load("tiny-flux", flags=flags, sets=[*(f"{key}={value}" for key, value in SETTINGS.items()), *sets])


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """A conversion of tiny-flux at 256 px that has fitted its embedder; a second phase is at 128 px."""
    root = tmp_path_factory.mktemp("home")
    (root / "pictures").mkdir()
    shapes = [shape for shape, count in SHAPES.items() for _ in range(count)]
    labels = world.sample_labels(len(shapes), 3)
    drawn = zip(shapes, labels, world.draw(labels, 3, 256), strict=True)
    for number, ((height, width), row, pixels) in enumerate(drawn):
        to_image(pixels[:, :height, :width]).save(root / "pictures" / f"{number}.png")
        (root / "pictures" / f"{number}.txt").write_text(world.caption(row.tolist()))
    conversion.convert(resolved(root), root / "run", root / "out", NULL, until="align-embedder")
    return prepare(resolved(root), Run(root / "run", NULL), NULL)


def test_base_sees_the_same_picture_at_its_home_size_and_in_the_first_phase_only(job):
    codecs = {"base": autoencoders.load(job.source.vae), "target": autoencoders.load(job.ae.folder)}
    rows = job.rows(256)
    captions = {file.with_suffix(".txt").read_text(): file for file in job.pictures_root.glob("*.png")}
    seen = set()
    for row in range(len(rows)):
        base, target = (found["z"] for found in rows.pairs([row]))
        height, width = target.shape[2] * 32, target.shape[3] * 32
        size = HOME[height, width]
        seen.add(size)
        for name, found, (down, across) in (("base", base, size), ("target", target, (height, width))):
            image = Image.open(captions[rows.captions([row])[0]])
            crop = ImageOps.fit(image, (across, down), Image.Resampling.LANCZOS)
            pixels = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(1, down, across, 3)
            wanted = codecs[name].encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
            torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)
    assert seen == set(HOME.values())
    tables = read_json(job.folders.latents / "index.json")["tables"]
    assert {name.split("-")[1] for name in tables if name.startswith("target-")} == {"128", "256"}
    assert {name.split("-")[1] for name in tables if name.startswith("base-")} == {"256"}


def test_embedder_is_fitted_token_to_token(job):
    """Its error is that of least squares by hand in float64, over the tokens of all pictures; rel. 1e-3 (the ridge)."""
    teacher = models.load(job.source.transformer, torch.float32)
    inputs, goals = [], []
    rows = job.rows(256)
    for row in range(len(rows)):
        base, target = (found["z"] for found in rows.pairs([row]))
        tokens = job.family.tokens(base, 2)
        assert tokens.shape[1] == target[0, 0].numel()
        goals.append(teacher.x_embedder(tokens)[0].detach().double())
        inputs.append(target.flatten(2)[0].T.double())
    x, y = torch.cat(inputs), torch.cat(goals)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    found = align_embedder.linear(
        models.load(
            job.folders.surgery / "transformer", torch.float32, job.folders.align_embedder / "modules.safetensors"
        ),
        job.family.embedder,
    )
    mine = (found(x[:, :-1].float()).double() - y).square().mean().item()
    best = (x @ torch.linalg.lstsq(x, y).solution - y).square().mean().item()
    assert mine == pytest.approx(best, rel=1e-3)
    metrics = read_json(job.folders.align_embedder / "stage.json")["metrics"]
    assert metrics["target"] == "home" and metrics["base_side"] == 128
    assert metrics["mse_after"] == pytest.approx(mine, rel=1e-4)


def test_gap_compares_the_same_tokens(job, tmp_path):
    """Both models have tokens on one grid, of each picture's own shape."""
    rows = job.rows(256)
    found = gap.measure(job, job.folders.surgery / "transformer", rows, tmp_path)
    assert len(found) == 6 and all(value > 0 for value in found)
    ours = [tokens[-1].shape[-2:] for _, tokens in gap.walk(job, job.source.transformer, rows, gap.BASE)]
    theirs = [
        tokens[-1].shape[-2:] for _, tokens in gap.walk(job, job.folders.surgery / "transformer", rows, gap.TARGET)
    ]
    assert ours == theirs == [(height // 16, width // 16) for height, width in sizes_of_rows(job)]


def sizes_of_rows(job: Job) -> list[tuple[int, int]]:
    rows = job.rows(256)
    return [
        HOME[height * 32, width * 32]
        for span, (_, height, width) in zip(rows.spans, rows.shapes, strict=True)
        for _ in span
    ]


def test_latents_for_home_are_no_latents_for_pooled(job):
    pooled = prepare(resolved(job.run.path.parent, "align_embedder.target=pooled"), Run(job.run.path, NULL), NULL)
    with pytest.raises(InputError, match="made from something else: home"):
        pooled.rows(256)
