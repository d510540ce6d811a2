"""The verb `evaluate`: what it draws, keeps and compares, its gates, and what it writes into the bundle."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from bundle.conftest import bundles, parts  # noqa: F401  fixtures
from conftest import copy_stages, run_cli, short_settings

import dcgen_convert
from dcgen_convert.api import command
from dcgen_convert.bundle import checks, layout, manifest
from dcgen_convert.bundle.loading import family_of
from dcgen_convert.cli.app import cli
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import AccessError, CheckFailed, InputError, ResourceError
from dcgen_convert.core.files import sha256
from dcgen_convert.core.journal import Run
from dcgen_convert.data import images, references
from dcgen_convert.evaluation import gates, plain, rows, summary
from dcgen_convert.evaluation.measures import Distance, Score
from dcgen_convert.evaluation.report import write_report
from dcgen_convert.evaluation.rows import Figures
from dcgen_convert.evaluation.tiny_measures import Accuracy
from dcgen_convert.judging import drawing, measuring
from dcgen_convert.judging.evaluating import evaluate
from dcgen_convert.judging.order import Asked
from dcgen_convert.ranks.crew import Crew
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import judged
from dcgen_convert.stages.job import prepare

KEYS = (  # frozen: scripts read these keys
    "schema status bundle base prompts count seed models sides jpeg reference weights measures values left_out gates "
    "notes pictures evaluation"
)
SETS = ("base", "ceiling", "converted", "floor")


@pytest.fixture
def asked(bundles, parts, tmp_path) -> Asked:  # noqa: F811
    """An evaluation of a small random bundle beside its base: three prompts, sharpness and colour."""
    bundle = Path(shutil.copytree(bundles("flux"), tmp_path / "bundle"))
    return Asked(
        bundle, tmp_path / "out", str(parts("flux").source), "tiny-world", 3, ("accuracy", "colour"), offline=True
    )


def files(out: Path) -> dict[str, str]:
    """Every picture with its hash."""
    return {path.relative_to(out).as_posix(): sha256(path) for path in (out / "pictures").rglob("*.png")}


def drawn(document: dict) -> list[int]:
    return [document["pictures"][name]["drawn"] for name in SETS]


def test_the_verb_judges_a_conversion_beside_its_base(converted, tmp_path):
    shutil.copytree(converted / "bundle", tmp_path / "bundle")
    call = ("evaluate", "bundle", "-n", "2", "--steps", "1", "--metrics", "accuracy,frechet", "--json")
    failed = run_cli(*call, "--max", "frechet-ratio=0.001", "--min", "accuracy=0", cwd=tmp_path)
    written = json.loads((tmp_path / "bundle-evaluation" / "evaluation.json").read_text())
    assert failed.returncode == 1 and json.loads(failed.stdout)["error"]["code"] == "check"
    ratio = written["values"]["frechet-ratio"]
    assert f"frechet-ratio is {ratio:.6g}, above the largest value that --max allows, 0.001" in failed.stderr
    assert written["status"] == "failed" and [gate["passed"] for gate in written["gates"]] == [True, False]

    done = run_cli(*call, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert [*document] == KEYS.split() and document["schema"] == "dcgen.evaluation/1" and document["status"] == "done"
    assert document["base"] == "tiny-flux" and document["prompts"] == "tiny-world" and drawn(document) == [0] * 4
    assert document["values"] == written["values"] and document["models"]["converted"]["runtime"] == "emulated"
    accuracy, frechet = document["measures"]
    assert {"converted", "base", "floor", "ceiling", "difference", "low", "high", "pairs"} <= accuracy.keys()
    assert frechet["ratio"] == frechet["converted"] / frechet["floor"] and "base" not in frechet
    assert json.loads((tmp_path / "bundle-evaluation" / "evaluation.json").read_text()) == document

    bundle = tmp_path / "bundle"
    card = (bundle / "README.md").read_text()
    assert "model-index:" in card and "Frechet distance (tiny world)" in card and str(tmp_path) not in card
    assert checks.check_files(bundle, manifest.read(bundle), NULL) == []


def test_only_what_is_missing_is_drawn_and_damage_is_noticed(asked, capsys):
    first = evaluate(asked, NULL)
    assert drawn(first) == [3] * 4 and len(files(asked.output)) == 12
    before = files(asked.output)
    longer = evaluate(replace(asked, count=4), NULL)
    assert drawn(longer) == [1] * 4 and before.items() <= files(asked.output).items()

    path = next(asked.output.rglob("pictures/converted-*/*.png"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    index = next(asked.output.rglob("pictures/base-*/index-0.jsonl"))
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:-1]) + lines[-1][:10])  # a kill in the middle of a line
    again = evaluate(replace(asked, count=4), Console())
    assert sum(drawn(again)) == 2 and f"{path} is damaged: it is drawn again" in capsys.readouterr().err
    assert path.read_bytes() == whole and again["values"] == longer["values"]
    assert drawn(evaluate(replace(asked, count=4), NULL)) == [0] * 4
    assert drawn(evaluate(replace(asked, steps=1), NULL))[:2] == [3, 3]


class Second(Crew):
    """The second of two ranks, as far as a task sees it."""

    rank, world = 1, 2

    def advance(self, *_, **__):
        """Progress that rank 0 would show."""


class Ranks(Crew):
    """Two ranks in one process, one after the other. of_other: files of measured values that the second one wrote."""

    def __init__(self):
        self.world, self.of_other = 2, []

    def share(self, task, bar=None, together=True, **arguments):
        done = [path for share in arguments.get("shares", ()) for path in share.of.folder.glob("*")]
        drawing.Helper(Second(), NULL)({}, task, pickle.loads(pickle.dumps(arguments)))
        for share in arguments.get("shares", ()):
            self.of_other += [path for path in share.of.folder.glob("*") if path not in done]
        return super().share(task, bar, together, **arguments)


def test_two_ranks_share_the_batches_and_make_the_same_files(asked, monkeypatch):
    monkeypatch.setattr(drawing, "BATCH", 2)
    evaluate(asked, NULL)
    crew = Ranks()
    both = replace(asked, output=asked.output.with_name("both"))
    evaluate(both, NULL, crew)
    assert files(both.output) == files(asked.output)
    assert [len(path.read_text().splitlines()) for path in sorted(both.output.rglob("base-*/index-*.jsonl"))] == [
        2,
        1,
        2,
        1,
    ]


def measured(out: Path) -> dict[str, str]:
    """Every file of measured values with its hash."""
    return {path.relative_to(out).as_posix(): sha256(path) for path in (out / "pictures").rglob("measured/*")}


def test_two_ranks_share_the_measuring_and_get_the_same_figures(asked, monkeypatch):
    monkeypatch.setattr(measuring, "together", lambda *_: 1)
    alone = evaluate(asked, NULL)
    crew = Ranks()
    both = replace(asked, output=asked.output.with_name("both"))
    assert evaluate(both, NULL, crew)["values"] == alone["values"]
    assert measured(both.output) == measured(asked.output) and len(measured(both.output)) == 4 * 3 * 2
    assert len(crew.of_other) == 4 * 1 * 2  # the second of three groups, of each set and measure


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How many pictures each measure has looked at."""
    found: Counter = Counter()
    for measure, method in ((plain.Colour, "features"), (plain.Sharpness, "scores"), (Accuracy, "scores")):
        original = getattr(measure, method)

        def counted(self, pictures, *more, original=original):
            found[self.name] += len(pictures)
            return original(self, pictures, *more)

        monkeypatch.setattr(measure, method, counted)
    return found


def test_one_more_measure_does_not_compute_the_others_again(asked, calls, tmp_path, capsys):
    (tmp_path / "references").mkdir()
    for number, path in enumerate(("a.png", "b.png")):
        images.write(torch.full((3, 64, 64), number - 0.5), tmp_path / "references" / path)
    asked = replace(asked, metrics=("colour",), reference=str(tmp_path / "references"))
    first = evaluate(asked, NULL)
    assert calls == {"colour": 4 * 3 + 2}
    more = replace(asked, metrics=("colour", "sharpness", "accuracy"))
    second = evaluate(more, NULL)
    assert calls == {"colour": 14, "sharpness": 12, "accuracy": 12}
    assert second["values"].items() >= first["values"].items()

    path = next(asked.output.rglob("converted-*/measured/colour-*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = evaluate(more, Console())
    assert calls == {"colour": 17, "sharpness": 12, "accuracy": 12} and again["values"] == second["values"]
    assert f"{path} is damaged: its pictures are measured again" in capsys.readouterr().err
    evaluate(replace(more, jpeg=False), NULL)
    assert calls == {"colour": 29, "sharpness": 24, "accuracy": 24}  # other pictures, but for the references


def test_other_weights_are_measured_anew(asked, calls, monkeypatch):
    evaluate(asked, NULL)
    evaluate(asked, NULL)
    assert calls == {"colour": 12, "accuracy": 12}
    monkeypatch.setattr(Accuracy, "made_of", lambda _: "other weights")
    evaluate(asked, NULL)
    assert calls == {"colour": 12, "accuracy": 24}


def test_pairs_that_are_left_out_are_told():
    """A score that applies to one side alone."""
    scores = {"base": [1.0, 2.0, math.nan, 3.0], "converted": [1.5, math.nan, 1.0, 3.5]}
    figures = {name: Figures({"accuracy": torch.tensor(values).double()}) for name, values in scores.items()}
    [row] = rows.rows(figures, [Accuracy()])
    assert row["pairs"] == 2 and row["dropped"] == 2 and row["difference"] == 0.5
    [(_, [cells])] = summary.tables([row])
    assert cells[-1] == "+0.5 (+0.5 to +0.5), 2 of 4 pairs"
    whole = {name: Figures({"accuracy": torch.ones(2).double()}) for name in scores}
    assert "dropped" not in rows.rows(whole, [Accuracy()])[0]


def test_the_command_starts_two_ranks(asked, tmp_path):
    call = ["evaluate", str(asked.bundle), "--against", asked.against, "--prompts", "tiny-world", "-n", "10"]
    done = run_cli(*call, "--metrics", "colour", "--out", "out", "--gpus", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "distance to the base" in done.stdout and (tmp_path / "out" / "log-rank-1.txt").is_file()
    assert len(files(tmp_path / "out")) == 40
    alone = evaluate(replace(asked, count=10, metrics=("colour",)), NULL)
    assert files(asked.output) == files(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["values"] == alone["values"]


def test_without_a_base_the_bundle_is_judged_alone(asked):
    alone = evaluate(replace(asked, against=None, metrics=None), NULL)
    assert alone["base"] is None and [*alone["pictures"]] == ["converted"]
    assert all(row["kind"] == "score" for row in alone["measures"]) and "colour" in alone["left_out"]
    assert "--against names a base" in alone["notes"][0]
    with pytest.raises(InputError, match="colour cannot be used: it compares two sets"):
        evaluate(replace(asked, against=None, metrics=("colour",)), NULL)


def test_a_base_of_other_sizes_is_measured_at_the_smaller_one(asked, monkeypatch):
    monkeypatch.setattr("dcgen_convert.judging.order.own_side", lambda *_: 32)
    document = evaluate(replace(asked, count=2), NULL)
    assert document["sides"] == {"converted": 64, "measured": 32, "base": 32}
    assert "the base draws at 32 px, as it was not trained on 64 px" in document["notes"][0]


def test_reference_pictures_and_jpeg(asked, tmp_path):
    (tmp_path / "real").mkdir()
    for number in range(3):
        images.write(
            torch.rand(3, 80, 70, generator=torch.Generator().manual_seed(number)), tmp_path / f"real/{number}.png"
        )
    document = evaluate(replace(asked, count=2, reference=str(tmp_path / "real")), NULL)
    assert document["jpeg"] and document["reference"] == {"name": str(tmp_path / "real"), "count": 3}
    (row,) = [row for row in document["measures"] if row["kind"] == "distance"]
    assert {*row["to_reference"]} == {*SETS} and document["values"]["colour-reference"] == row["to_reference"][
        "converted"
    ]
    assert str(tmp_path) not in (asked.bundle / "README.md").read_text()
    plain = evaluate(replace(asked, count=2, reference=str(tmp_path / "real"), jpeg=False), NULL)
    assert drawn(plain) == [0] * 4 and plain["values"] != document["values"]


def test_mjhq_gives_prompts_in_the_authors_order_and_all_its_pictures(asked, tmp_path):
    folder = tmp_path / "mjhq"
    entries = {f"{i:02d}": {"category": "animals", "prompt": f"a fox {i}"} for i in range(6)}
    (folder / "animals").mkdir(parents=True)
    (folder / "meta_data.json").write_text(json.dumps(entries))
    only = replace(asked, prompts=f"mjhq:{folder}", metrics=("colour",))
    assert evaluate(only, NULL)["reference"] is None
    for name in entries:
        images.to_image(torch.rand(3, 70, 70) * 2 - 1).save(folder / "animals" / f"{name}.jpg")
    document = evaluate(only, NULL)
    order = numpy.random.RandomState(0).choice(6, 3, replace=False)
    files = sorted((asked.output / "pictures").glob("converted-*/*.png"))
    hashes = [hashlib.sha256(f"a fox {number}".encode()).hexdigest()[:12] for number in order]
    assert [file.name for file in files] == [f"{i}-{digest}.png" for i, digest in enumerate(hashes)]
    assert document["reference"]["count"] == 6 and document["jpeg"] and "colour-reference" in document["values"]
    with pytest.raises(InputError, match="has 6 prompts, and 7 are asked for"):
        evaluate(replace(only, count=7), NULL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gates": ("fid=3",)}, "fid is not measured here"),
        ({"gates": ("accuracy-ratio=3",)}, "accuracy-ratio is not measured here"),
        ({"metrics": ("accurracy",)}, "there is no measure 'accurracy'"),
        ({"side": 70}, "not a multiple of 32 px"),
        ({"against": "nothing"}, "unknown source 'nothing'"),
        ({"prompts": "none.txt"}, "none.txt does not exist"),
        ({"prompts": "tiny-edits"}, "draws pictures, and tiny-edits are instructions to edit"),
        ({"prompts": "tiny-videos"}, "draws pictures, and tiny-videos are captions of videos"),
        ({"reference": "none"}, "none is not a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_drawn(asked, given, message):
    if "gates" in given:
        given = {"gates": tuple(gates.parse(given["gates"], []))}
    with pytest.raises(InputError, match=message):
        evaluate(replace(asked, **given), NULL)
    assert files(asked.output) == {}


def test_two_commands_do_not_share_a_folder(asked):
    with (
        Run(asked.output, NULL).locked(),
        pytest.raises(ResourceError, match="another process works in") as caught,
    ):
        evaluate(asked, NULL)
    assert caught.value.hint == "wait for it, or choose another --out"


def test_a_damaged_bundle_is_not_judged(asked):
    path = asked.bundle / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckFailed, match="is damaged: transformer/diffusion_pytorch_model.safetensors"):
        evaluate(asked, NULL)


@pytest.mark.parametrize("text", ["clip", "clip=", "clip=much", "clip=nan", "=3"])
def test_a_gate_is_a_name_and_a_number(text):
    with pytest.raises(InputError, match="--min takes NAME=VALUE"):
        gates.parse([text], [])


class Light(Score):
    """Mean brightness; it does not apply to the caption "-"."""

    name, label = "light", "brightness"

    def scores(self, pictures, captions):
        found = pictures.double().flatten(1).mean(1)
        return torch.where(torch.tensor([caption == "-" for caption in captions]), math.nan, found)


class Apart(Distance):
    name, label = "apart", "distance of the means"

    def features(self, pictures):
        return pictures.flatten(2).mean(2)

    def distance(self, a, b):
        return (a.mean(0) - b.mean(0)).norm().item()


def test_rows_are_what_the_measures_say():
    measures = [Light(), Apart()]
    generator = torch.Generator().manual_seed(1)
    pictures = {name: torch.rand(4, 3, 8, 8, generator=generator) for name in ("converted", "base", "floor", "ceiling")}
    captions = ["a", "-", "b", "c"]
    batches = {name: [(one[:3], captions[:3]), (one[3:], captions[3:])] for name, one in pictures.items()}
    light, apart = rows.rows({name: rows.measured(batches[name], measures) for name in pictures}, measures)
    kept = [0, 2, 3]
    for name, one in pictures.items():
        assert light[name] == pytest.approx(one[kept].double().mean().item(), abs=1e-12)
    assert light["difference"] == pytest.approx(light["converted"] - light["base"]) and light["pairs"] == 3
    assert light["low"] <= light["difference"] <= light["high"]
    far = {
        name: (one.mean((0, 2, 3)) - pictures["base"].mean((0, 2, 3))).norm().item() for name, one in pictures.items()
    }
    assert {name: apart[name] for name in ("converted", "floor", "ceiling")} == pytest.approx(
        {name: far[name] for name in ("converted", "floor", "ceiling")}, abs=1e-6
    )
    assert apart["ratio"] == apart["converted"] / apart["floor"]
    assert [*rows.values([light, apart])] == rows.names(measures, pictures)


def test_a_set_is_no_distance_from_itself_and_no_figure_comes_from_nothing():
    measures = [Light(), Apart()]
    figures = rows.measured([(torch.rand(2, 3, 8, 8), ["-", "-"])], measures)
    light, apart = rows.rows({name: figures for name in ("converted", "base", "floor")}, measures)
    assert apart["converted"] == apart["floor"] == 0 and "ratio" not in apart
    assert "converted" not in light and "difference" not in light
    document = {"measures": [light, apart], "left_out": {}, "notes": [], "gates": [], "evaluation": "here"}
    assert "light" in summary.text(document)
    assert rows.rows({"converted": Figures(features=figures.features)}, [Apart()])[0].keys() == {
        "measure", "kind", "better", "label", "unit",
    }  # fmt: skip


def test_the_bundle_is_right_at_every_moment_while_its_card_is_written(asked, monkeypatch):
    bundle, seen = asked.bundle, []

    def whole() -> None:
        seen.append(checks.check_files(bundle, manifest.read(bundle), NULL))

    for name in ("atomic_write", "write_json"):
        original = getattr(layout, name)

        def watched(*arguments, original=original) -> None:
            whole()
            original(*arguments)
            whole()

        monkeypatch.setattr(layout, name, watched)
    row = {"measure": "clip", "kind": "score", "better": "higher", "label": "CLIP score", "converted": 27.5}
    layout.add_metrics(bundle, family_of(bundle), "evaluate", {"count": 2, "prompts": "x", "measures": [row]})
    assert len(seen) == 6 and not any(seen) and "CLIP score" in (bundle / "README.md").read_text()
    assert manifest.BEFORE not in manifest.read(bundle)["files"]["README.md"]


def test_pictures_are_measured_in_batches_of_bounded_size(tmp_path):
    assert [references.together(side) for side in (128, 256, 1024, 4096)] == [64, 64, 4, 1]


def test_keywords_become_the_options_of_the_verb():
    values = {"metrics": "clip,cmmd", "jpeg": False, "min": ["clip=27.5"], "max": [], "count": 8, "resolution": 512}
    parsed = cli.commands["evaluate"].make_context("evaluate", [".", *command.options(values)]).params
    assert {key: parsed[key] for key in values} == {**values, "min": ("clip=27.5",), "max": ()}


def test_numbers_out_of_range_are_refused():
    for given, message in (({"count": 1}, "count is 1"), ({"steps": 0}, "steps is 0"), ({"out": ""}, "out is empty")):
        with pytest.raises(InputError, match=message):
            dcgen_convert.evaluate("bundle", **given)


def test_a_recipe_with_measures_gives_the_same_rows_in_the_last_stage(converted, tmp_path):
    """Only the last two stages run."""
    copy_stages(converted, tmp_path, "quantize")
    settings = short_settings(**{"evaluate.metrics": "[accuracy, frechet]"})
    call = ("tiny-flux", "--ae", "tiny-dc-ae-f32", "--quantize", "nvfp4", "-o", "bundle", "--run-dir", "run", "-y")
    done = run_cli(*call, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "evaluate: frechet-ratio" in done.stderr and "quantize: holds, skipped" in done.stderr
    found = manifest.read(tmp_path / "bundle")["metrics"]["verify"]["evaluation"]
    accuracy, frechet = found["measures"]
    assert found["count"] == 2 and found["sides"] == {"converted": 128, "base": 128, "measured": 128}
    assert {"converted", "base", "floor", "ceiling", "difference"} <= accuracy.keys()
    assert frechet["ratio"] == frechet["converted"] / frechet["floor"]
    assert "model-index:" in (tmp_path / "bundle" / "README.md").read_text()
    page = write_report(tmp_path / "run").read_text()
    assert "noise floor" in page and "Frechet distance (tiny world)" in page


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluate.metrics=[acuracy]", "there is no measure 'acuracy'. Did you|did you mean accuracy"),
        ("evaluate.metrics=[clip]", "CLIP"),
        ("evaluate.reference=nowhere", "nowhere is not a folder"),
    ],
)
def test_measures_that_cannot_run_are_refused_before_the_conversion(tmp_path, setting, message):
    resolved = load("tiny-flux", sets=["evaluate.metrics=[accuracy]", setting])
    job = prepare(resolved, Run(tmp_path / "run", NULL), NULL)
    with pytest.raises((InputError, AccessError)) as caught:
        judged.require(job, 3)
    assert re.search(message, f"{caught.value.message} {caught.value.hint}")
