"""The verb `evaluate` of a model that edits: which picture each instruction is given, kept and compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bundle.conftest import bundles, parts  # noqa: F401  fixtures
from conftest import run_cli
from diffusers import FluxKontextPipeline

from dcgen_convert import families
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.data import drawn_edits, edit_prompts, images
from dcgen_convert.evaluation import tiny_edits
from dcgen_convert.judging import drawing
from dcgen_convert.judging.evaluating import evaluate
from dcgen_convert.judging.order import Asked, settle
from dcgen_convert.tiny import world

from .test_evaluate import Ranks, drawn, files, measured

SIDE, COUNT = 64, 3
METRICS = ("edit-accuracy", "preservation", "colour")


@pytest.fixture
def asked(bundles, parts, tmp_path) -> Asked:  # noqa: F811
    """Three edits of the tiny world, by a small random bundle and its base."""
    bundle = Path(shutil.copytree(bundles("flux-kontext"), tmp_path / "bundle"))
    source = str(parts("flux-kontext").source)
    return Asked(bundle, tmp_path / "out", source, "tiny-edits", count=COUNT, metrics=METRICS, offline=True)


@pytest.fixture
def rows(tmp_path) -> Path:
    """Four rows: two instructions, each for two pictures. Only the sources are there."""
    (tmp_path / "photos").mkdir()
    lines = []
    for number in range(4):
        pixels = torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(number)) * 2 - 1
        images.write(pixels, tmp_path / "photos" / f"{number}.png")
        row = {
            "image": "gone.png",
            "source": f"photos/{number}.png",
            "caption": f"make it {('red', 'blue')[number % 2]}",
        }
        lines.append(json.dumps({**row, "source": [row["source"]]} if number else row))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def stock(folder, text, picture, seed, steps, guidance):
    """The picture that diffusers' own pipeline makes of ``picture``, (3, H, W) in [0, 1], by itself."""
    pipeline = FluxKontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    size = dict(height=SIDE, width=SIDE, max_area=SIDE**2, _auto_resize=False, max_sequence_length=16)
    call = dict(prompt=text, image=picture[None], num_inference_steps=steps, guidance_scale=guidance, **size)
    return pipeline(**call, generator=torch.Generator().manual_seed(seed), output_type="pt").images[0]


def test_each_picture_is_the_edit_that_the_stock_pipeline_makes_of_its_own_reference(asked, parts):  # noqa: F811
    """One at a time there, three at once here: atol 2 levels of 8 bits. Figures by hand, from the files."""
    document = evaluate(asked, NULL)
    assert drawn(document) == [COUNT] * 4 and document["prompts"] == "tiny-edits"
    trial = settle(asked, NULL)
    base = trial.gallery("base", trial.base)
    scenes, texts = drawn_edits.sampled(COUNT, asked.seed + 104_729)
    assert trial.prompts == texts == base.prompts
    for place in range(COUNT):
        reference = world.draw(scenes[place][None], asked.seed + 104_729 + place, SIDE)[0]
        given = images.read_pixels(trial.edits[place].files[0], SIDE)
        torch.testing.assert_close(given, reference, atol=1 / 127, rtol=0)
        how = trial.base.steps, trial.base.guidance
        wanted = stock(parts("flux-kontext").source, texts[place], (given + 1) / 2, place, *how)
        found = (images.read_pixels(base.file(place), SIDE) + 1) / 2
        torch.testing.assert_close(found, wanted, atol=2 / 255, rtol=0)
    references = torch.stack([images.read_pixels(edit.files[0], SIDE) for edit in trial.edits])
    for name, painter in (("base", trial.base), ("converted", trial.converted)):
        gallery = trial.gallery(name, painter)
        pixels = torch.stack([images.read_pixels(gallery.file(place), SIDE) for place in range(COUNT)])
        accuracy, kept, _ = document["measures"]
        assert accuracy[name] == tiny_edits.changed(pixels, texts).mean()
        assert kept[name] == pytest.approx(tiny_edits.kept(pixels, references, texts).nanmean(1).mean().item())
    assert {"floor", "ceiling", "ratio"} <= document["measures"][2].keys()


def test_another_picture_is_another_edit_and_the_others_are_kept(asked, rows):
    """Rows {image, source, caption}: what is edited counts, also where instructions are equal."""
    asked = replace(asked, prompts=str(rows), count=4, metrics=("colour",))
    assert drawn(evaluate(asked, NULL)) == [4] * 4
    before = files(asked.output)
    converted = [digest for name, digest in before.items() if "/converted-" in name]
    assert len({*converted}) == 4
    images.write(torch.full((3, 70, 90), 0.4), rows.parent / "photos" / "2.png")
    assert drawn(evaluate(asked, NULL)) == [1] * 4 and before.items() <= files(asked.output).items()
    assert drawn(evaluate(replace(asked, count=3), NULL)) == [0] * 4  # more begin with the same ones


def test_what_is_measured_of_an_edit_depends_on_what_was_edited(asked, monkeypatch):
    first = evaluate(asked, NULL)
    before = measured(asked.output)
    make = edit_prompts.make
    monkeypatch.setattr(
        edit_prompts,
        "make",
        lambda *args, **more: [replace(one, digest=f"{one.digest}x") for one in make(*args, **more)],
    )
    second = evaluate(asked, NULL)  # the same pictures under other names
    assert second["values"] == first["values"]
    new = {Path(name).name for name in measured(asked.output).keys() - before.keys()}
    assert {name.rpartition("-")[0] for name in new} == {"preservation"}


def test_two_ranks_make_and_measure_the_same_edits(asked, monkeypatch):
    monkeypatch.setattr(drawing, "BATCH", 2)
    alone = evaluate(asked, NULL)
    both = replace(asked, output=asked.output.with_name("both"))
    assert evaluate(both, NULL, Ranks())["values"] == alone["values"]
    assert files(both.output) == files(asked.output) and measured(both.output) == measured(asked.output)


def test_the_command_edits_the_pictures_of_a_folder(asked, rows):
    (rows.parent / "texts.txt").write_text("make it red\nmake it green")
    call = [
        "evaluate",
        "bundle",
        "--against",
        asked.against,
        "--prompts",
        "texts.txt",
        "--sources",
        "photos",
        "-n",
        "5",
    ]
    done = run_cli(*call, "--metrics", "colour", "--json", cwd=rows.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert document["prompts"] == "texts.txt, on the pictures of photos" and document["count"] == 5
    assert (
        "photos" in (asked.bundle / "README.md").read_text()
        and str(rows.parent) not in (asked.bundle / "dcgen_manifest.json").read_text()
    )
    edits = edit_prompts.make(
        str(rows.parent / "texts.txt"), str(rows.parent / "photos"), 5, 0, most=1, folder=rows.parent, side=SIDE
    )
    assert [edit.files[0].name for edit in edits] == ["0.png", "1.png", "2.png", "3.png", "0.png"]
    assert {edit.text for edit in edits[:2]} == {"make it red", "make it green"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": None}, "nothing says how"),
        ({"prompts": "tiny-world"}, "tiny-world gives captions, no instructions"),
        ({"prompts": "TEXTS"}, "nothing says which pictures are edited"),
        ({"prompts": "TEXTS", "sources": "nowhere"}, "nowhere is not a folder"),
        ({"sources": "."}, "tiny-edits says itself which pictures are edited"),
        ({"prompts": "ROWS", "sources": "."}, "says itself which pictures are edited"),
        ({"prompts": "TWO"}, "row 1 has 2 sources, and the model takes 1"),
        ({"prompts": "GONE"}, "gone.png"),
        ({"prompts": "MUTE"}, "row 2 has no instruction"),
        ({"against": "FLUX"}, "is a flux model, which cannot edit pictures"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_anything_is_drawn(asked, rows, parts, given, message):  # noqa: F811
    folder = rows.parent
    (folder / "texts.txt").write_text("make it red")
    (folder / "two.jsonl").write_text('{"source": ["photos/0.png", "photos/1.png"], "caption": "join them"}')
    (folder / "gone.jsonl").write_text('{"source": "gone.png", "caption": "make it red"}')
    (folder / "mute.jsonl").write_text('{"source": "photos/0.png", "caption": "x"}\n{"source": "photos/0.png"}')
    names = {name.upper(): str(folder / f"{name}.jsonl") for name in ("rows", "two", "gone", "mute")}
    names |= {"TEXTS": str(folder / "texts.txt"), "FLUX": str(parts("flux").source)}
    with pytest.raises(InputError, match=message):
        evaluate(replace(asked, **{key: names.get(value, value) for key, value in given.items()}), NULL)
    assert files(asked.output) == {}


def test_a_model_that_can_do_without_pictures_edits_where_they_are_named(rows):
    (rows.parent / "texts.jsonl").write_text('{"caption": "a red fox"}')
    plain = str(rows.parent / "texts.jsonl")
    found = map(families.get, ("flux2", "flux-kontext", "flux"))
    flux2, kontext, flux = ((one.fewest_references, one.references) for one in found)
    asked_of = edit_prompts.asked_of
    for kind, sources in ((str(rows), None), ("tiny-edits", None), (plain, str(rows.parent / "photos"))):
        assert (
            asked_of(*flux2, kind, sources) and asked_of(*kontext, kind, sources) and not asked_of(*flux, kind, sources)
        )
    for kind in (plain, "builtin", None, "hf://datasets/a/b:text"):
        assert not asked_of(*flux2, kind, None) and asked_of(*kontext, kind, None)


def test_a_base_of_the_other_task_is_refused(bundles, parts, tmp_path):  # noqa: F811
    asked = Asked(bundles("flux"), tmp_path / "out", str(parts("flux-kontext").source), "tiny-world", offline=True)
    with pytest.raises(InputError, match="is a flux-kontext model, which edits pictures"):
        evaluate(asked, NULL)


def test_pictures_to_edit_are_nothing_for_a_model_that_draws_from_text(bundles, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="draws from text alone"):
        evaluate(Asked(bundles("flux"), tmp_path / "out", sources=str(tmp_path), offline=True), NULL)
