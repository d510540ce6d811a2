"""Stage `align-head`: a start for the new output head, then embedder + head trained with the blocks frozen.

The head is linear in the features that reach it. So with frozen blocks its optimum over sampled (t, noise, text) is the
solution of one least-squares problem. This holds for guidance-distilled bases too. Their corrected velocity v_hat =
v(null) + (g_d / g) [v_g(c) - v(null)] (`train.objective`) is what the same head, with the same bias, makes from the
features h(null) + (g_d / g) [h_g(c) - h(null)]. B batch, N tokens, D width, C channels.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dcgen_convert.core import clock, names
from dcgen_convert.core.files import atomic_save, read_object, sealed, write_json
from dcgen_convert.core.journal import Stage
from dcgen_convert.core.progress import Bar
from dcgen_convert.data import buckets
from dcgen_convert.data.cache import LatentCache
from dcgen_convert.networks import models, pipelines
from dcgen_convert.networks.at_once import AtOnce
from dcgen_convert.planning.fit import head_phase
from dcgen_convert.stages import head_fit
from dcgen_convert.stages.align_embedder import linear, xavier
from dcgen_convert.stages.head_fit import HeadFit, Ledger
from dcgen_convert.stages.job import Job
from dcgen_convert.stages.layout import first_device, fitted
from dcgen_convert.train import objective, phases
from dcgen_convert.train.loop import Place

START = "start.safetensors"  # embedder and head before training: for the other ranks, and for a run that is resumed
STARTED = "start.json"  # what was measured of them


def run(job: Job, stage: Stage) -> None:
    """Writes modules.safetensors (embedder and head); reports the held-out loss after the start and after training."""
    settings = job.recipe.align_head
    resolution = job.recipe.adapt.phases[0].resolution
    train_rows, held_out = job.of_phase(1).rows(resolution).split()
    embedder = job.folders.align_embedder / names.MODULES
    model = surgical(job, embedder, pipelines.device())
    task = phases.Task(model, job.family, job.recipe.adapt, train_rows, job.scheduler, within=job.expert.within)
    stage.metrics.update(start(job, stage, task, held_out))
    output = stage.folder / names.MODULES
    if not settings.steps:
        atomic_save(module_state(job, model), output)
        return
    layout = fitted(job, head_phase(job.recipe), "align head")
    with job.crew.share("train-head", expert=job.expert.name, layout=layout):
        record = train(job, layout, model)
    atomic_save(load_file(record["exports"]["modules"]), output)
    if layout["zero"] == 3:  # this model's weights stay partitioned
        task = replace(task, model=surgical(job, output, pipelines.device()))
    else:
        models.load_modules(model, output)
    loss = heldout_loss(job, task, held_out)
    stage.metrics.update(loss_trained=loss, train_seconds=record["seconds"])
    job.console.say(f"align head: after {settings.steps} steps with frozen blocks, held-out loss {loss:.4f}")


def start(job: Job, stage: Stage, task: phases.Task, held_out: LatentCache) -> dict[str, Any]:
    """Fill the head, or load what an interrupted run filled it with; what is to be reported of it."""
    modules, record = stage.folder / START, stage.folder / STARTED
    if modules.exists() and sealed(modules) and record.exists():
        models.load_modules(task.model, modules)
        return read_object(record)
    begun = time.perf_counter()
    method = "kept" if job.keeps_latents else job.recipe.align_head.method
    found: dict[str, Any] = {"method": method, **start_head(job, task, held_out, stage.folder)}
    found["start_seconds"] = round(time.perf_counter() - begun, 2)
    found["loss_start"] = heldout_loss(job, task, held_out)
    job.console.say(
        f"align head: {found['method']} start, held-out loss {found['loss_start']:.4f}, {found['start_seconds']} s"
    )
    atomic_save(module_state(job, task.model), modules)
    write_json(record, found)
    shutil.rmtree(stage.folder / head_fit.SUMS, ignore_errors=True)
    return found


def surgical(job: Job, modules: Path, device: str) -> nn.Module:
    """The transformer of stage `surgery` with the embedder, or embedder and head, of the file ``modules``."""
    return models.load(job.folders.surgery / models.TRANSFORMER, job.dtype, modules, device)


def train(job: Job, layout: dict[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """Embedder and head with the blocks frozen, on every rank; without ``model``, from what rank 0 started with.

    Args:
        layout: zero, offload and micro_batch, as rank 0 chose them.
    """
    device = first_device(layout)
    model = surgical(job, job.folders.align_head / START, device) if model is None else model.to(device)
    recipe = job.recipe
    if recipe.compile and layout["zero"] < 3:
        models.compile_blocks(job.family, model)
    adapt = recipe.adapt.model_copy(update={"zero": layout["zero"], "offload": layout["offload"]})
    rows = job.of_phase(1).rows(recipe.adapt.phases[0].resolution).split()[0]
    task = phases.Task(model, job.family, adapt, rows, job.scheduler, within=job.expert.within)
    place = Place(job.folders.align_head / names.TRAINING, job.console, recipe.seed)
    return phases.train_head(task, recipe.align_head, recipe.dtype, layout["micro_batch"], place)


def module_state(job: Job, model: nn.Module) -> dict[str, Tensor]:
    """Embedder and head under the model's own names, float32 on the CPU."""
    wanted = (job.family.embedder, job.family.head)
    return {name: p.detach().float().cpu() for name, p in model.named_parameters() if name.rpartition(".")[0] in wanted}


def heldout_loss(job: Job, task: phases.Task, rows: LatentCache) -> float:
    """Loss of the recipe's objective on held-out rows, mean over fixed quantiles of t."""

    def with_at_once(pictures: range) -> float:
        parts = [list(part) for part in buckets.batches(rows.spans, len(pictures))]
        batches = [(part, *rows.batch(part)) for part in parts]
        with clock.timed("evaluate", len(rows)):
            loss = objective.evaluate_loss(task.loss(), batches, job.recipe.seed, task.sampling, pipelines.device())
        return loss["mean"]

    halving = AtOnce("align head: held-out loss", job.console.warn)
    return next(halving.parts(range(job.recipe.latents.batch), with_at_once))  # the first is of as many as fit


def start_head(job: Job, task: phases.Task, held_out: LatentCache, folder: Path) -> dict[str, Any]:
    """Fill the head in place: least squares, Xavier or zero; or keep it. What is to be reported of it.

    Args:
        folder: takes the sums of the least squares while they grow.
    """
    if job.keeps_latents:
        return {}
    settings = job.recipe.align_head
    head = linear(task.model, job.family.head)
    with torch.no_grad():
        head.weight.zero_()
        if head.bias is not None:
            head.bias.zero_()
        if settings.method == "xavier":
            head.weight.copy_(xavier(head, job.recipe.seed)[0].reshape(head.weight.shape))
        elif settings.method == "least-squares":
            weight, bias, found = fit_head(job, task, held_out, folder)
            # A learned-sigma head writes 2 C channels; the stock pipeline drops the second half, which stays zero.
            head.weight[: len(weight)].copy_(weight.reshape(-1, *head.weight.shape[1:]))
            if head.bias is not None:
                head.bias[: len(bias)].copy_(bias)
            return found
    return {}


def fit_head(job: Job, task: phases.Task, held_out: LatentCache, folder: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Least squares with the other ranks: W (C, K), b (C,) in float64, and what is to be reported."""
    fit = HeadFit(job, task, held_out, folder)
    ledger = Ledger.open(fit)
    if ledger.reason is None:
        with (
            job.console.progress("least squares for the head", None, "samples") as bar,
            job.crew.share("fit-head", bar, expert=job.expert.name, begun=ledger.begun),
        ):
            head_fit.work(fit, bar, ledger.begun, ledger)
    assert ledger.solution is not None, "the fit has ended"
    rows = fit.rows[1 : ledger.begun]
    job.console.say(f"align head: {sum(rows):,} of at most {sum(fit.rows[1:]):,} rows: {ledger.reason}")
    report = {"rows": sum(rows), "rows_most": sum(fit.rows[1:]), "rows_reason": ledger.reason}
    return *ledger.solution, {**report, "loss_by_rows": ledger.losses}


def fit_part(job: Job, bar: Bar, begun: int) -> None:
    """What the other ranks do of `fit_head`."""
    rows, held_out = job.of_phase(1).rows(job.recipe.adapt.phases[0].resolution).split()
    model = surgical(job, job.folders.align_embedder / names.MODULES, pipelines.device())
    task = phases.Task(model, job.family, job.recipe.adapt, rows, job.scheduler, within=job.expert.within)
    head_fit.work(HeadFit(job, task, held_out, job.folders.align_head), bar, begun)
