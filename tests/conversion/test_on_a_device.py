"""What a conversion does outside the training engine, on a pretend device: tensors left on the CPU would raise."""

import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pretend_device
import pytest
import torch

from dcgen_convert import conversion
from dcgen_convert.core import names
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.journal import Run, Stage
from dcgen_convert.networks import models, pipelines
from dcgen_convert.planning.memory import GIB
from dcgen_convert.stages import adapt, align_head, gap, grid, layout
from dcgen_convert.stages.job import prepare
from dcgen_convert.train import objective, phases
from dcgen_convert.train.engine import Engine, move_buffers


@pytest.fixture
def job(converted):
    return prepare(conversion.recorded(converted / "run")[0], Run(converted / "run", NULL), NULL)


class Stopped(Exception):
    """The engine was about to be made."""


@pytest.fixture
def handed_over(monkeypatch):
    """Takes the engine's place: "devices" of the parameters that it is given, and its "settings"."""
    seen = {}

    def engine(model, named, settings, matrices=()):
        seen.update(devices={p.device.type for p in model.parameters()}, settings=settings)
        raise Stopped

    monkeypatch.setattr(phases, "Engine", engine)
    return seen


@pytest.fixture
def device(monkeypatch):
    with pretend_device.ready() as name:
        monkeypatch.setattr(pipelines, "device", lambda: name)
        yield name


def test_the_pretend_device_refuses_tensors_of_the_cpu(device):
    there, here = torch.ones(2, device=device), torch.ones(2)
    assert (there + there).cpu().tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="two devices"):
        there + here


def test_the_gap_is_the_same_on_a_device(job, device, tmp_path):
    found = gap.measure(job, job.folders.converted, job.rows(job.resolution).split()[1], tmp_path)
    recorded = json.loads((job.folders.merge(1) / "stage.json").read_text())["metrics"]["gap"]
    assert found == pytest.approx(recorded, rel=1e-4)


def test_the_gap_holds_one_model_at_a_time(job, tmp_path, monkeypatch):
    """And is that of both models side by side, bit by bit. The tokens on the disk go away."""
    rows = job.rows(job.resolution).split()[1]
    base, converted = (models.load(folder, job.dtype) for folder in (job.source.transformer, job.folders.converted))
    sums = []
    for index in range(min(len(rows), gap.PICTURES)):
        tokens = []
        for model, latent in zip((base, converted), (pair["z"] for pair in rows.pairs([index])), strict=True):
            sampling = phases.sampling_of(job.family, job.recipe.adapt, latent.shape[1:], model.config, job.scheduler)
            drawn = objective.draw(job.recipe.seed, 0, [index], latent.shape[1:], sampling, objective.EVALUATION)
            drawn = replace(drawn, t=torch.full((1,), gap.T))
            with torch.no_grad():
                tokens.append(gap.block_tokens(job.family, model, latent, rows.condition([index]), drawn))
        sums.append(torch.stack([gap.squares(old, new) for old, new in zip(*tokens, strict=True)]))
    distance, norm = sum(sums[1:], sums[0]).unbind(1)

    alive = weakref.WeakSet()
    original = models.load

    def load(*given, **named):
        assert not alive, "a second model is loaded"
        model = original(*given, **named)
        alive.add(model)
        return model

    monkeypatch.setattr(models, "load", load)
    assert gap.measure(job, job.folders.converted, rows, tmp_path) == (distance / norm).tolist()
    assert not list(tmp_path.iterdir())


def test_the_head_starts_the_same_on_a_device(job, device, tmp_path):
    rows, held_out = job.rows(job.resolution).split()
    embedder = job.folders.align_embedder / names.MODULES
    model = models.load(job.folders.surgery / models.TRANSFORMER, job.dtype, embedder, device)
    task = phases.Task(model, job.family, job.recipe.adapt, rows, job.scheduler)
    align_head.start_head(job, task, held_out, tmp_path)
    recorded = json.loads((job.folders.align_head / "stage.json").read_text())["metrics"]
    assert align_head.heldout_loss(job, task, held_out) == pytest.approx(recorded["loss_start"], rel=1e-3)
    models.load_modules(model, job.folders.align_head / names.MODULES)
    assert align_head.heldout_loss(job, task, held_out) == pytest.approx(recorded["loss_trained"], rel=1e-3)


def test_the_grid_is_drawn_on_a_device(job, device, tmp_path):
    _, held_out = job.rows(job.resolution).split()
    model = models.load(job.folders.converted, job.dtype, device=device)
    grid.drawing(job, held_out, tmp_path)(lambda *at: objective.velocity(job.family, model, *at), 4)
    assert (tmp_path / "samples" / "step-000004.png").stat().st_size > 1000


@pytest.mark.parametrize(("zero", "place"), [(2, pretend_device.NAME), (3, "cpu")])
def test_zero_3_starts_from_the_cpu(zero, place, job, device, handed_over):
    """So that no rank needs the whole model on its device: the engine moves a rank's own shards. Phases and head."""
    chosen = {"zero": zero, "offload": "none", "micro_batch": 2}
    with pytest.raises(Stopped):
        adapt.train_phase(job, 1, chosen, None)
    assert handed_over["devices"] == {place}
    model = align_head.surgical(job, job.folders.align_embedder / names.MODULES, device)
    with pytest.raises(Stopped):
        align_head.train(job, chosen, model)
    assert handed_over["devices"] == {place}


def test_buffers_move_without_the_parameters(device):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    move_buffers(model, device)
    assert {buffer.device.type for buffer in model.buffers()} == {device}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("stage", ["head", "phase"])
def test_the_micro_batch_comes_from_the_memory(stage, job, handed_over, monkeypatch, tmp_path, capsys):
    """Room for some pictures of the batch, not for all: as many as divide the batch are taken, and the console says
    so.
    """
    batch, recipe = 64, job.recipe
    phases_of_batch = [phase.model_copy(update={"batch": batch}) for phase in recipe.adapt.phases]
    larger = {
        "align_head": recipe.align_head.model_copy(update={"batch": batch}),
        "adapt": recipe.adapt.model_copy(update={"phases": phases_of_batch}),
    }
    job = replace(job, console=Console(), recipe=recipe.model_copy(update=larger))
    monkeypatch.setattr(layout.psutil, "virtual_memory", lambda: SimpleNamespace(available=1.6 * GIB))
    with pytest.raises(Stopped):
        (align_head.run if stage == "head" else lambda *at: adapt.adapt_phase(*at, 1))(job, Stage(tmp_path))
    settings = handed_over["settings"]
    assert 1 < settings.micro_batch < batch == settings.batch and batch % settings.micro_batch == 0
    said = capsys.readouterr().err
    assert f"micro-batch {settings.micro_batch} of the {batch} pictures per rank and step" in said


def test_the_head_can_be_trained_with_zero_3(job, tmp_path, monkeypatch):
    """Its weights stay partitioned, so that the loss afterwards is that of a model loaded again; the same as with
    ZeRO 2.
    """
    config = Engine._config

    def small_too(self):  # DeepSpeed leaves small tensors whole by default
        made = config(self)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    monkeypatch.setattr(Engine, "_config", small_too)
    recorded = json.loads((job.folders.align_head / "stage.json").read_text())["metrics"]
    for name in ("surgery", "latents", "align-embedder"):
        (tmp_path / name).symlink_to(job.run.path / name)
    recipe = job.recipe.model_copy(update={"adapt": job.recipe.adapt.model_copy(update={"zero": 3})})
    job = replace(job, recipe=recipe, run=Run(tmp_path, NULL))
    stage = Stage(job.folders.align_head)
    stage.folder.mkdir()
    align_head.run(job, stage)
    assert stage.metrics["loss_trained"] == pytest.approx(recorded["loss_trained"], rel=1e-4)
