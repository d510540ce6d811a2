"""FLUX.1 Kontext through the real command: rows with the picture that each was made from, to a 4-bit bundle.

The model is random; what is looked at is where the reference goes. References have other shapes than the pictures.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle.conftest import flux_transformer
from conftest import run_cli, short_settings
from families.tiny_models import TINY
from PIL import Image
from safetensors.torch import load_file

from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import Run
from dcgen_convert.data import drawn_edits, images
from dcgen_convert.networks import autoencoders
from dcgen_convert.recipe.loading import Resolved, load
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages import captions, depends, edited, pictures
from dcgen_convert.stages.job import prepare
from dcgen_convert.tiny import edits, world

COUNT, SIDE = 10, 64
SETTINGS = {
    "adapt.phases.0.resolution": SIDE,
    "adapt.phases.0.batch": 4,
    "adapt.phases.0.steps": 2,
    "align_head.steps": 0,
    "latents.batch": 4,
    "latents.scale_tolerance": 1000,
    "watch.grid_every": 2,
    "watch.pictures": 1,
    "bundle.steps": 2,
    "quantize.rank": 16,
    "evaluate.metrics": "none",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Kontext of a width that 4-bit formats can hold."""
    folder = tmp_path_factory.mktemp("kontext") / "source"
    TINY["flux-kontext"].build(folder)
    flux_transformer(16, width=128).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A list of edited pictures; the instruction of each names its number."""
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(3)
    lines = []
    for number in range(COUNT):
        for name, (height, width) in (("edited", (SIDE, SIDE)), ("original", (80, 100))):
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}-{number}.png")
        row = {"image": f"edited-{number}.png", "source": [f"original-{number}.png"], "caption": f"edit {number}"}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def folder(source, rows, tmp_path_factory):
    """Folder with bundle and run."""
    root = tmp_path_factory.mktemp("edited")
    arguments = [str(source), "--recipe", "tiny-flux", "--ae", "tiny-dc-ae-f32", "-o", "bundle", "--run-dir", "run"]
    arguments += ["-y", "--data", str(rows), "--quantize", "nvfp4"]
    done = run_cli(*arguments, *short_settings(**SETTINGS), cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def job_of(folder):
    record = json.loads((folder / "run" / "recipe.json").read_text())
    return prepare(Resolved(Recipe.model_validate(record["recipe"]), {}), Run(folder / "run", NULL), NULL)


def new_job(source, run, *sets, **flags):
    chosen = {"source": str(source), "ae": "tiny-dc-ae-f32", "resolution": SIDE, **flags}
    return prepare(load("image", sets=sets, flags=chosen), Run(run, NULL), NULL)


def test_both_autoencoders_see_the_reference_of_each_row(folder, rows):
    """Its largest centred part of the picture's shape, by Pillow, one at a time; atol 2e-4 (batches of 4 there)."""
    job = job_of(folder)
    found = images.read_index(folder / "run" / "latents" / "rows.jsonl", job.pictures_root)
    assert len(found) == COUNT
    for name, place in (("base", job.source.vae), ("target", job.ae.folder)):
        codec = autoencoders.load(place)
        shard = load_file(folder / "run" / "latents" / f"{name}-{SIDE}-00000.safetensors")
        for row, picture in enumerate(found):
            number = picture.caption.split()[1]
            for tensor, file in (("z", f"edited-{number}.png"), ("reference", f"original-{number}.png")):
                image = Image.open(rows.parent / file)
                left, top = (image.width - min(image.size)) // 2, (image.height - min(image.size)) // 2
                box = (left, top, left + min(image.size), top + min(image.size))
                image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
                wanted = codec.encode(pixels)[0]
                torch.testing.assert_close(shard[tensor][row].float(), wanted.float(), atol=2e-4, rtol=2e-4)


def test_a_batch_holds_the_reference_of_the_space_that_is_asked_for(folder):
    cache = job_of(folder).rows(SIDE)
    (z, text), (base, seen) = cache.batch([3, 1]), cache.seen("base", [3, 1])
    assert z.shape == text["reference"].shape == (2, 32, 2, 2)
    assert base.shape == seen["reference"].shape == (2, 4, 32, 32)
    torch.testing.assert_close(text["reference"], cache.read("target", [3, 1])["reference"])
    assert "reference" not in cache.null


def test_the_calibration_draws_edits(folder):
    """A call holds 4 tokens of the picture and 4 of its reference."""
    calls = sorted((folder / "run" / "quantize" / "calls").glob("call-*.safetensors"))
    tensors = load_file(calls[0])
    shapes = {tuple(value.shape) for value in tensors.values()}
    assert (1, 8, 32) in shapes and (8, 3) in shapes


def test_the_bundle_edits_in_two_sizes(folder, rows):
    def drawn(place, *arguments):
        done = run_cli("sample", "bundle", "-p", "make it red", "-o", place, *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        return np.array(Image.open(next((folder / place).glob("*.png"))), dtype=float)

    first, other = (drawn(f"of-{n}", "--image", str(rows.parent / f"original-{n}.png")) for n in (0, 1))
    assert first.shape == (SIDE, SIDE, 3) and not np.array_equal(first, other)
    wide = drawn("wide", "--image", str(rows.parent / "original-0.png"), "--height", "64", "--width", "128")
    assert wide.shape == (64, 128, 3) and wide.std() > 1


def test_what_a_sample_lacks_is_said(folder):
    done = run_cli("sample", "bundle", "-p", "make it red", cwd=folder)
    assert done.returncode == 2 and "edits a picture, and none was given" in done.stderr and "--image" in done.stderr
    done = run_cli("sample", "bundle", "-p", "make it red", "--image", "none.png", cwd=folder)
    assert done.returncode == 2 and "none.png" in done.stderr


def test_the_picture_grid_of_the_bundle_begins_with_what_is_edited(folder):
    assert "the picture that is edited" in (folder / "bundle" / "README.md").read_text()


def test_the_base_edits_the_pictures_of_a_folder_in_turn(source, tmp_path):
    """The first instruction edits the first picture; where instructions are more, the pictures are used again."""
    (tmp_path / "before").mkdir()
    for name in "abc":
        Image.new("RGB", (80, 80), "teal").save(tmp_path / "before" / f"{name}.png")
    (tmp_path / "texts.txt").write_text("\n".join(f"edit {n}" for n in range(5)))
    sets = [f"data.sources={tmp_path / 'before'}", f"data.prompts={tmp_path / 'texts.txt'}", "data.count=5"]
    job = new_job(source, tmp_path / "run", *sets)
    pictures.require(job)
    found = pictures.intended(job)
    assert [picture.references[0].name for picture in found] == ["a.png", "b.png", "c.png", "a.png", "b.png"]
    assert sorted(picture.caption for picture in found) == [f"edit {n}" for n in range(5)]
    before = depends.inputs(job, "data")
    Image.new("RGB", (80, 80), "red").save(tmp_path / "before" / "b.png")
    after = depends.inputs(new_job(source, tmp_path / "run", *sets), "data")
    assert {name for name in before if before[name] != after[name]} == {depends.SOURCES}


def test_edits_of_the_tiny_world_are_drawn_beside_their_instructions(source, tmp_path):
    job = new_job(source, tmp_path / "run", "data.prompts=tiny-edits", "data.count=3", "data.resolution=64", "seed=5")
    pictures.require(job)
    Path(job.folders.data).mkdir(parents=True)
    found = pictures.intended(job)
    wanted = edits.sample(drawn_edits.BLOCK, 5)
    assert [picture.caption for picture in found] == wanted.instructions[:3]
    for number, picture in enumerate(found):
        pixels = world.draw(wanted.before[number : number + 1], 5 + number, 64)[0]
        torch.testing.assert_close(images.read_pixels(*picture.references, 64), pixels, atol=1 / 127, rtol=0)
    assert drawn_edits.sampled(drawn_edits.BLOCK + 2, 5)[1][:3] == wanted.instructions[:3]


def test_what_is_tried_is_held_out_and_comes_with_its_own_reference(folder):
    job = job_of(folder)
    held = json.loads((folder / "run" / "latents" / "held-out.json").read_text())
    listed = images.read_index(folder / "run" / "latents" / "rows.jsonl", job.pictures_root)
    texts = captions.others(job, 3, 99)
    assert texts[: len(held)] == [listed[row].caption for row in held][:3]
    files = edited.of_prompts(job, 3, 99, folder)
    assert [file.name for (file,) in files] == [f"original-{text.split()[1]}.png" for text in texts]


def test_a_model_that_learned_drawn_edits_is_tried_with_others(source, tmp_path):
    sets = [
        "data.kind=folder",
        "data.path=tiny-edits:64",
        "data.prompts=tiny-edits",
        "data.count=4",
        "data.resolution=64",
    ]
    job = new_job(source, tmp_path / "run", *sets)
    wanted = edits.sample(drawn_edits.BLOCK, 99)
    assert captions.others(job, 6, 99) == wanted.instructions[:6]
    for number, (file,) in enumerate(edited.of_prompts(job, 6, 99, tmp_path / "given")):
        pixels = world.draw(wanted.before[number : number + 1], 99 + number, 64)[0]
        torch.testing.assert_close(images.read_pixels(file, 64), pixels, atol=1 / 127, rtol=0)


@pytest.mark.parametrize(
    "sets, says",
    [
        (["data.prompts=builtin"], "builtin gives captions"),
        (["data.prompts=tiny-world"], "tiny-world gives captions"),
        (["data.prompts=TEXTS"], "names none to edit"),
        (["data.prompts=TEXTS", "data.sources=nowhere"], "nowhere is not a folder"),
        (["data.prompts=TEXTS", "data.sources=EMPTY"], "holds no pictures"),
    ],
)
def test_edits_that_the_base_cannot_draw_are_refused_before_any_work(sets, says, source, tmp_path):
    (tmp_path / "texts.txt").write_text("make it red\nmake it blue")
    (tmp_path / "empty").mkdir()
    names = {"TEXTS": str(tmp_path / "texts.txt"), "EMPTY": str(tmp_path / "empty")}
    sets = ["=".join(names.get(part, part) for part in text.split("=")) for text in sets]
    with pytest.raises(InputError, match=says):
        pictures.require(new_job(source, tmp_path / "run", *sets))


@pytest.mark.parametrize(
    "made_from, says",
    [
        (None, "1 of 10 pictures do not say what they were made from, first .*edited-4.png"),
        (["original-1.png", "original-2.png"], "made from more than the 1 that .* reads, first .*edited-4.png from 2"),
        ("gone.png", "1 of 10 pictures cannot be read.*gone.png"),
    ],
)
def test_a_row_without_one_readable_source_is_refused_by_name(made_from, says, source, rows, tmp_path):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for row in lines:
        row |= {"image": str(rows.parent / row["image"]), "source": str(rows.parent / row["source"][0])}
    lines[4] = {**lines[4], "source": made_from}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = {"data.path": str(tmp_path / "rows.jsonl"), "data.kind": "folder"}
    with pytest.raises(InputError, match=says):
        pictures.require(new_job(source, tmp_path / "run", "data.min_side=1", **flags))


def test_a_changed_reference_is_another_picture(source, rows, tmp_path):
    for file in rows.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    flags = {"data.path": str(tmp_path / rows.name), "data.kind": "folder"}
    before = depends.inputs(new_job(source, tmp_path / "run", **flags), "data")
    Image.new("RGB", (80, 80)).save(tmp_path / "original-7.png")
    after = depends.inputs(new_job(source, tmp_path / "run", **flags), "data")
    assert {name for name in before if before[name] != after[name]} == {depends.PICTURES}
