"""Measures of the sample grids inside a real training: as `evaluate` judges, once for each grid, across a kill."""

import json
import shutil

import pytest
import torch
from conftest import SHORT, copy_stages
from PIL import Image
from stopping import Stopping

from dcgen_convert.conversion import convert
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import AccessError, InputError, Terminated
from dcgen_convert.core.files import read_json
from dcgen_convert.core.journal import Run
from dcgen_convert.evaluation import measures
from dcgen_convert.evaluation.measures import Weights
from dcgen_convert.evaluation.pixels import from_images
from dcgen_convert.evaluation.report import write_report
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import watched
from dcgen_convert.stages.job import prepare

STEPS, STOP, PICTURES = 6, 2, 4
WATCH = {"watch.grid_every": 2, "watch.evaluate_every": 2, "watch.pictures": PICTURES}
NAMES = ["accuracy", "frechet", "sharpness", "colour"]


def resolved(**changes):
    values = {**SHORT, "adapt.phases.0.steps": STEPS, **WATCH, "watch.metrics": "[accuracy, frechet]", **changes}
    return load("tiny-flux", sets=[f"{key}={value}" for key, value in values.items()])


def lines(run):
    return [json.loads(line) for line in (run / "adapt-1" / "measures.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stopped(converted, tmp_path_factory):
    """A training that stopped after the checkpoint of a step whose grid was due, with its log; then it was finished."""
    folder = tmp_path_factory.mktemp("watched")
    copy_stages(converted, folder, "align-head")
    run, out = folder / "run", folder / "bundle"
    with pytest.raises(Terminated):
        convert(resolved(), run, out, Stopping(STOP), until="adapt-1")
    assert (run / "adapt-1" / "checkpoints" / f"step-{STOP:06d}").exists()
    assert not (run / "adapt-1" / "samples").exists()
    (run / "adapt-1" / "measures.jsonl").write_text('{"step": 2, "measure": "accuracy", "value": 0.5}\n{"step": 4, "m')
    shutil.copytree(run, folder / "then")
    convert(resolved(), run, out, Console("quiet", log_file=folder / "log.txt"), until="adapt-1")
    return folder


def test_each_grid_is_measured_once_across_a_stop(stopped):
    """The grid that was due when it stopped is drawn by the run that goes on; lines cut short are replaced."""
    found = lines(stopped / "run")
    assert [(line["step"], line["measure"]) for line in found] == [(step, name) for step in (2, 4, 6) for name in NAMES]
    assert {line["phase"] for line in found} == {"adapt-1"} and {line["beside"] for line in found} == {"round trip"}
    sheets = sorted(path.name for path in (stopped / "run" / "adapt-1" / "samples").iterdir())
    assert sheets == [f"step-{step:06d}.png" for step in (2, 4, 6)]
    log = (stopped / "log.txt").read_text()
    assert f"adapt-1: after step 4, {PICTURES} pictures: accuracy" in log


def test_the_figures_are_those_of_the_pictures_on_the_sheet(stopped):
    """By hand, from the cells of the last sheet: the evaluator sees 128 px, the cells show 192 px of the same."""
    sheet = Image.open(stopped / "run" / "adapt-1" / "samples" / f"step-{STEPS:06d}.png")
    cells = [
        [sheet.crop((4 + 196 * x, 32 + 210 * y, 196 + 196 * x, 224 + 210 * y)) for y in range(PICTURES)] for x in (0, 1)
    ]
    drawn, trips = (from_images([cell.resize((128, 128)) for cell in column]) for column in cells)
    job = prepare(resolved(), Run(stopped / "run", NULL), NULL)
    captions = job.rows(128).split()[1].captions(range(PICTURES))
    frechet = measures.chosen(["frechet"], Weights(), captions)[0][0]
    by_hand = frechet.distance(frechet.features(drawn), frechet.features(trips))
    [found] = [line for line in lines(stopped / "run") if (line["step"], line["measure"]) == (STEPS, "frechet")]
    assert found["value"] == pytest.approx(by_hand, rel=0.1)


def test_the_loss_of_no_answer_is_that_of_the_data(stopped):
    """|| eps - z_0 ||^2 is 1 + the mean square of the latents, up to the noise of few rows."""
    before = read_json(stopped / "run" / "adapt-1" / "evaluation-before.json")
    job = prepare(resolved(), Run(stopped / "run", NULL), NULL)
    held_out = job.rows(128).split()[1]
    z0 = held_out.batch(list(range(len(held_out))))[0]
    assert before["nothing"] == pytest.approx(1 + z0.square().mean().item(), rel=0.03)
    assert before["mean"] < before["nothing"]  # it began aligned


def test_the_report_draws_the_measures_and_a_training_that_goes_on(stopped):
    page = write_report(stopped / "run").read_text()
    assert "accuracy of the sample grids, measures.jsonl" in page and "with the captions of other pictures" in page
    assert "frechet of the sample grids, divided by that of two halves of the round trips" in page
    assert "Training loss, metrics.jsonl" in page and "pictures that were kept apart</span>" in page
    assert "not finished" not in page
    page = write_report(stopped / "then").read_text()
    assert "<h2>adapt-1, not finished</h2>" in page and "Training loss, metrics.jsonl" in page


def test_measures_change_nothing_in_the_training(stopped, converted):
    """Nor do they throw work away: the stage holds without them."""
    said = stopped / "again.txt"
    changes = {"watch.metrics": "none", "watch.pictures": 3}
    convert(resolved(**changes), stopped / "run", stopped / "bundle", Console("quiet", log_file=said), until="adapt-1")
    assert "adapt-1: holds, skipped" in said.read_text()
    assert torch.isfinite(torch.tensor(read_json(stopped / "run" / "adapt-1" / "stage.json")["metrics"]["loss_last"]))


def test_a_missing_alignment_is_said_before_the_first_step(converted, tmp_path):
    copy_stages(converted, tmp_path, "latents")
    random = {"align_embedder.method": "none", "align_head.method": "xavier", "align_head.steps": 0}
    few = {"adapt.phases.0.steps": 2, "watch.metrics": "none", "watch.grid_every": 0, "watch.evaluate_every": 1}
    console = Console("quiet", log_file=tmp_path / "log.txt")
    convert(resolved(**random, **few), tmp_path / "run", tmp_path / "bundle", console, until="adapt-1")
    log = (tmp_path / "log.txt").read_text()
    assert log.count("warning   adapt-1: alignment missing: the held-out loss begins at") == 1
    assert log.index("alignment missing") < log.index("held-out loss", log.index("align_head.method least-squares"))
    [text] = read_json(tmp_path / "run" / "adapt-1" / "stage.json")["metrics"]["verdicts"]
    assert text.startswith("alignment missing") and "after step 2 it is" in text
    page = write_report(tmp_path / "run").read_text()
    assert page.index("seen while it trained") < page.index("alignment missing") < page.index("<h2>surgery</h2>")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"watch.metrics": "[clip]"}, AccessError, "--set evaluate.clip=FOLDER"),
        ({"watch.metrics": "[fid]"}, AccessError, "--set evaluate.inception=FILE"),
        ({"watch.metrics": "[clip]", "evaluate.clip": "no/where"}, AccessError, "no/where, which evaluate.clip names"),
        ({"watch.metrics": "[acuracy]"}, InputError, "did you mean accuracy"),
        ({"watch.metrics": "[crops-frechet]"}, InputError, "256 px"),
        ({"data.count": 30}, InputError, "of 30 only one is kept apart"),
    ],
)
def test_measures_that_cannot_run_are_refused_before_anything_is_done(tmp_path, changes, kind, message):
    with pytest.raises(kind) as caught:
        convert(resolved(**changes), tmp_path / "run", tmp_path / "bundle", NULL)
    assert message in f"{caught.value.message} {caught.value.hint}" and "--clip" not in caught.value.hint
    assert not (tmp_path / "run" / "surgery").exists()


def test_a_phase_that_is_done_needs_no_measures(stopped):
    job = prepare(resolved(**{"watch.metrics": "[clip]"}), Run(stopped / "run", NULL), NULL)
    watched.require(job)
