"""Stages that are short of memory: what is drawn in halves, what is freed, and the error of one that cannot go on."""

import weakref
from dataclasses import replace

import pytest
import torch

from dcgen_convert import conversion
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import ResourceError
from dcgen_convert.core.journal import Run, Stage
from dcgen_convert.data import images
from dcgen_convert.networks import pipelines
from dcgen_convert.stages import compare, pictures
from dcgen_convert.stages.job import prepare

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
