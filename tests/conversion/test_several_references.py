"""Rows with one reference or two: spans of their own in the latents, batches of one number, and what is refused.

The stages run in this process, on a family of which one picture more is allowed than it takes.
"""

import json
import tarfile

import pytest
import torch
from families.tiny_models import TINY
from PIL import Image

from dcgen_convert import families
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import Found, Run, Wanted
from dcgen_convert.data import buckets, images
from dcgen_convert.data.images import Picture
from dcgen_convert.families.base import reference_keys, references_of
from dcgen_convert.networks import autoencoders
from dcgen_convert.planning import plan
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import depends, latents, pictures
from dcgen_convert.stages.job import prepare
from dcgen_convert.train.order import BatchOrder

COUNT, SIDE = 9, 64
COLOURS = ["red", "teal", "navy", "gold", "black", "pink", "green", "grey", "white"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kontext") / "source"
    TINY["flux-kontext"].build(folder)
    return folder


@pytest.fixture
def two(monkeypatch):
    """FLUX.1 Kontext as if it took up to two pictures."""
    monkeypatch.setattr(families.get("flux-kontext"), "references", 2)


def sources_of(number):
    """Every third picture was made from two others, in this order."""
    return [f"{COLOURS[-1 - number]}.png", *([f"{COLOURS[number]}.png"] if number % 3 == 1 else [])]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (80, 100), colour).save(folder / f"{colour}.png")
        Image.new("RGB", (SIDE + 2 * number, SIDE), colour).save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "source": sources_of(number), "caption": f"edit {number}"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def job_of(source, run, rows, *sets):
    flags = {"source": str(source), "ae": "tiny-dc-ae-f32", "resolution": SIDE, "data.path": str(rows)}
    flags |= {"data.kind": "folder"}
    more = ["latents.scale_tolerance=1000", "latents.batch=2", "data.min_side=1", *sets]
    return prepare(load("image", sets=more, flags=flags), Run(run, NULL), NULL)


def encoded(job):
    for name, work in (("data", pictures.run), ("latents", latents.run)):
        with job.run.stage(Wanted(name, depends.inputs(job, name)), Found("nothing")) as stage:
            work(job, stage)
    return job.rows(SIDE)


@pytest.mark.parametrize("sets", [[], ["data.buckets=true"]], ids=["squares", "buckets"])
def test_rows_of_one_number_lie_together_and_hold_every_reference_in_its_order(sets, two, source, rows, tmp_path):
    """The latents are those of each file alone; atol 2e-4 (batches of 2 there)."""
    job = job_of(source, tmp_path / "run", rows, *sets)
    cache, codec = encoded(job), autoencoders.load(job.ae.folder)
    numbers = [int(caption.split()[1]) for caption in cache.captions(range(COUNT))]
    assert sorted(numbers) == list(range(COUNT))
    counts = [{len(sources_of(numbers[row])) for row in span} for span in cache.spans]
    assert all(len(found) == 1 for found in counts) and {1, 2} == set.union(*counts)
    kinds = [(*found, shape) for found, shape in zip(counts, cache.shapes, strict=True)]
    assert len(set(kinds)) == len(kinds)  # one span for each
    for span in cache.spans:
        z, text = cache.batch(list(span))
        for row, own in zip(span, zip(*references_of(text), strict=True), strict=True):
            assert len(own) == len(sources_of(numbers[row]))
            for name, latent in zip(sources_of(numbers[row]), own, strict=True):
                height, width = (32 * side for side in z.shape[2:])
                wanted = codec.encode(images.read_pixels(rows.parent / name, height, width)[None])[0]
                torch.testing.assert_close(latent, wanted.float(), atol=2e-4, rtol=2e-4)


def test_every_batch_has_rows_of_one_number(two, source, rows, tmp_path):
    cache = encoded(job_of(source, tmp_path / "run", rows))
    order, seen = BatchOrder(cache.spans, 2, seed=1), set()
    for step in range(9):
        text = cache.batch(order.rows_of(step))[1]
        seen.add(len(references_of(text)))
        assert all(reference.shape == (2, 32, 2, 2) for reference in references_of(text))
    assert seen == {1, 2}


def test_new_rows_are_appended_and_the_rows_before_keep_their_places(two, source, rows, tmp_path):
    lines = rows.read_text().splitlines()
    few = rows.with_name("few.jsonl")
    few.write_text("\n".join(lines[:5]))
    before = encoded(job_of(source, tmp_path / "run", few)).captions(range(5))
    few.write_text("\n".join(lines))
    job = job_of(source, tmp_path / "run", few)
    with job.run.stage(Wanted("data", depends.inputs(job, "data")), Found("nothing")) as stage:
        pictures.run(job, stage)
    stage.folder = job.folders.latents
    latents.run(job, stage)
    cache = job.rows(SIDE)
    assert cache.captions(range(5)) == before and len(cache) == COUNT
    for row, caption in enumerate(cache.captions(range(COUNT))):
        count = len(sources_of(int(caption.split()[1])))
        assert len(references_of(cache.batch([row])[1])) == count


def test_a_row_with_more_references_than_the_family_takes_is_refused_by_name(source, rows, tmp_path):
    with pytest.raises(InputError, match=r"3 of 9 pictures .* more than the 1 .* first .*[/]1.png from 2") as caught:
        pictures.require(job_of(source, tmp_path / "run", rows))
    assert "shorten 'source'" in caught.value.hint


def test_a_sample_of_a_shard_without_a_source_is_refused_by_its_number(source, rows, tmp_path):
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for number in range(3):
            (tmp_path / "caption.txt").write_text(f"edit {number}")
            tar.add(rows.parent / f"{number}.png", f"{number}.png")
            tar.add(tmp_path / "caption.txt", f"{number}.txt")
            if number != 1:
                tar.add(rows.parent / "red.png", f"{number}.source.png")
    with pytest.raises(InputError, match=r"1 of 3 pictures do not say .* first .*rows.tar-.*/0000001.png"):
        pictures.require(job_of(source, tmp_path / "run", tmp_path / "rows.tar"))


def test_an_index_gives_back_one_source_or_several(tmp_path):
    found = [
        Picture(
            tmp_path / "a.png", "a", references=(tmp_path / "b.png", tmp_path / "c.png"), references_sha256=("1", "2")
        ),
        Picture(tmp_path / "d.png", "d", references=(tmp_path / "b.png",), references_sha256=("1",)),
        Picture(tmp_path / "e.png", "e"),
    ]
    images.write_index(tmp_path / "index.jsonl", found, tmp_path)
    assert images.read_index(tmp_path / "index.jsonl", tmp_path) == found
    written = [json.loads(line).get("source") for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert written == [["b.png", "c.png"], "b.png", None]


def test_tables_of_rows_with_one_number_keep_their_names():
    assert buckets.spans([(1, 1)] * 4, [], 64, [0] * 4) == buckets.whole(4, 64)
    names = [span.table for span in buckets.spans([(1, 1)] * 4, [], 64, [0, 0, 1, 0])]
    assert names == ["64", "64-more1", "64"]
    assert [*reference_keys(3)] == ["reference", "reference-2", "reference-3"]


def test_a_plan_prices_the_most_references_of_a_row(two, source, rows):
    """With two the networks see three times the tokens of the picture."""

    def planned():
        flags = {"ae": "tiny-dc-ae-f32", "resolution": SIDE, "data.path": str(rows), "data.kind": "folder"}
        return plan.plan(load("image", sets=["data.min_side=1"], flags={"source": str(source), **flags}))

    assert any("up to 2 references of its size" in note and "3 times" in note for note in planned()["notes"])
