"""Stages that are short of memory: what is drawn in halves, what is freed, and the error of one that cannot go on."""

import weakref
from dataclasses import replace

import pytest
import torch

from dcgen_convert import conversion
from dcgen_convert.core import names
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import ResourceError
from dcgen_convert.core.journal import Run, Stage
from dcgen_convert.data import images
from dcgen_convert.networks import models, pipelines
from dcgen_convert.stages import align_head, compare, pictures, quantize
from dcgen_convert.stages.job import prepare
from dcgen_convert.stages.preview import converted_pipeline
from dcgen_convert.svdquant.record import CALLS, read_calls, record_calls
from dcgen_convert.train import objective, phases

SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def job(converted):
    return prepare(conversion.recorded(converted / "run")[0], Run(converted / "run", NULL), NULL)


def with_data(job, run, **changes):
    """The job in another run folder, with other settings of the data."""
    data = job.recipe.data.model_copy(update=changes)
    return replace(job, run=Run(run, NULL), console=Console(), recipe=job.recipe.model_copy(update={"data": data}))


def short_above(limit, monkeypatch):
    """Drawing more than ``limit`` pictures at once runs out of memory."""
    original = pipelines.draw

    def draw(family, pipeline, prompts, *rest, **named):
        if len(prompts) > limit:
            raise SHORT
        return original(family, pipeline, prompts, *rest, **named)

    monkeypatch.setattr(pipelines, "draw", draw)


def test_drawing_goes_on_with_half_the_batch(converted, job, tmp_path, monkeypatch, capsys):
    """The same pictures as in the batch that was asked for: equal to one step of 8 bits."""
    job = with_data(job, tmp_path, count=4, batch=4)
    short_above(2, monkeypatch)
    job.folders.data.mkdir()
    drawn = pictures.synthesise(job)
    assert "data: drawing: out of memory with 4 pictures at once, going on with 2" in capsys.readouterr().err
    for picture in drawn:
        side, former = job.recipe.data.resolution, converted / "run" / "data" / "pictures" / picture.file.name
        now, before = (images.read_pixels(file, side) for file in (picture.file, former))
        assert (now - before).abs().max() <= 2 / 255 + 1e-6


def test_the_head_is_fitted_with_fewer_pictures_at_once(job, tmp_path, monkeypatch, capsys):
    """Its least squares and its held-out loss: as with the batch that was asked for, up to the order of sums."""
    job = replace(job, console=Console())
    rows, held_out = job.rows(job.resolution).split()
    model = align_head.surgical(job, job.folders.align_embedder / names.MODULES, "cpu")
    task = phases.Task(model, job.family, job.recipe.adapt, rows, job.scheduler)

    def fitted(folder):
        folder.mkdir()
        weight, bias, _ = align_head.fit_head(job, task, held_out, folder)
        return weight, bias, align_head.heldout_loss(job, task, held_out)

    weight, bias, loss = fitted(tmp_path / "whole")
    original = objective.predict

    def predict(family, model, z, *rest):
        if len(z) > 3:
            raise SHORT
        return original(family, model, z, *rest)

    monkeypatch.setattr(objective, "predict", predict)
    fewer = fitted(tmp_path / "fewer")
    told = capsys.readouterr().err
    assert "align head: least squares: out of memory with" in told and "align head: held-out loss: out of" in told
    assert torch.allclose(fewer[0], weight, rtol=1e-3, atol=1e-4) and torch.allclose(fewer[1], bias, atol=1e-4)
    assert fewer[2] == pytest.approx(loss, rel=1e-5)


def test_the_calibration_is_drawn_in_halves(converted, job, tmp_path, monkeypatch):
    """Two pictures that do not fit together are recorded one by one, as the shared run recorded them."""
    told = []
    texts = replace(quantize.calibration_set(job), batch=2)
    short_above(1, monkeypatch)
    network = models.load(job.folders.converted, job.dtype)
    with NULL.progress("calibration", 2) as bar:
        record_calls(tmp_path, job.family, lambda: converted_pipeline(job, network), texts, bar, [(0, 2)], told.append)
    assert told == ["calibration: out of memory with 2 pictures at once, going on with 1"]
    assert texts.missing(tmp_path) == []
    for ours, theirs in zip(read_calls(tmp_path), read_calls(job.folders.quantize / CALLS), strict=True):
        assert ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes()


def test_a_stage_that_cannot_go_on_names_its_setting(job, tmp_path, monkeypatch):
    short_above(0, monkeypatch)
    short = with_data(job, tmp_path, count=2, batch=2)
    step = conversion.Step("data", pictures.run, {"x": 1})
    with short.run.locked(), pytest.raises(ResourceError, match="stage data: out of memory") as caught:
        conversion._run_steps(short, [step], tmp_path / "bundle", [], [])
    assert "data.batch" in caught.value.hint


def test_verify_holds_one_pipeline_at_a_time(job, tmp_path, monkeypatch):
    """The source's, the 16-bit twin's and the bundle's network: each is gone before the next one draws."""
    alive, seen, original = weakref.WeakSet(), [], pipelines.draw

    def draw(family, pipeline, *rest, **named):
        network = getattr(pipeline, family.component)
        assert not [other for other in alive if other is not network], "another network is still in memory"
        alive.add(network)
        seen.append(id(network))
        return original(family, pipeline, *rest, **named)

    monkeypatch.setattr(pipelines, "draw", draw)
    compare.run(job, Stage(tmp_path), job.run.path.parent / "bundle")
    assert len(seen) == 3 and (tmp_path / "grid.png").exists()
