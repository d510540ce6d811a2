"""Stage `align-head`: a start for the new output head, then embedder + head trained with the blocks frozen.

The head is linear in the features that reach it. So with frozen blocks its optimum over sampled (t, noise, text) is the
solution of one least-squares problem. This holds for guidance-distilled bases too. Their corrected velocity v_hat =
v(null) + (g_d / g) [v_g(c) - v(null)] (`train.objective`) is what the same head, with the same bias, makes from the
features h(null) + (g_d / g) [h_g(c) - h(null)]. B batch, N tokens, D width, C channels.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dcgen_convert.core import names
from dcgen_convert.core.files import atomic_save, sealed
from dcgen_convert.core.journal import Stage
from dcgen_convert.data import buckets
from dcgen_convert.data.cache import LatentCache
from dcgen_convert.families import Text
from dcgen_convert.networks import models, pipelines
from dcgen_convert.planning.fit import head_phase
from dcgen_convert.stages.align_embedder import linear, xavier
from dcgen_convert.stages.job import Job
from dcgen_convert.stages.layout import first_device, fitted
from dcgen_convert.train import objective, phases
from dcgen_convert.train.loop import Place
from dcgen_convert.train.ridge import NormalEquations

RIDGE = 1e-6  # relative: the features of a finite sample are nearly collinear
START = "start.safetensors"  # embedder and head before training: for the other ranks, and for a run that goes on
EQUATIONS = "equations.safetensors"  # of the closed form, while they are summed up
KEEP_EVERY = 600.0  # seconds after which the sums are kept: a kill costs ten minutes at most
DRAW_STREAM = 1 << 30  # first step of the closed form's draws: no training run reaches it, so no draw comes twice


def run(job: Job, stage: Stage) -> None:
    """Writes modules.safetensors (embedder and head); reports the held-out loss after the start and after training."""
    settings = job.recipe.align_head
    resolution = job.recipe.adapt.phases[0].resolution
    train_rows, held_out = job.rows(resolution).split()
    embedder = job.folders.align_embedder / names.MODULES
    model = surgical(job, embedder, pipelines.device())
    task = phases.Task(model, job.family, job.recipe.adapt, train_rows, job.scheduler)
    started = time.perf_counter()
    begun = stage.folder / START
    if begun.exists() and sealed(begun):  # a training that was stopped goes on
        models.load_modules(model, begun)
    else:
        start_head(job, task, stage.folder / EQUATIONS)
        if settings.steps:
            atomic_save(module_state(job, model), begun)
    (stage.folder / EQUATIONS).unlink(missing_ok=True)
    stage.metrics.update(method=settings.method, start_seconds=round(time.perf_counter() - started, 2))
    loss = heldout_loss(job, task, held_out)
    stage.metrics["loss_start"] = loss
    job.console.say(
        f"align head: {settings.method} start, held-out loss {loss:.4f}, {stage.metrics['start_seconds']} s"
    )
    output = stage.folder / names.MODULES
    if not settings.steps:
        atomic_save(module_state(job, model), output)
        return
    layout = fitted(job, head_phase(job.recipe), "align head")
    with job.crew.share("train-head", layout=layout):
        record = train(job, layout, model)
    atomic_save(load_file(record["exports"]["modules"]), output)
    if layout["zero"] == 3:  # this model's weights stay partitioned
        task = replace(task, model=surgical(job, output, pipelines.device()))
    else:
        models.load_modules(model, output)
    loss = heldout_loss(job, task, held_out)
    stage.metrics.update(loss_trained=loss, train_seconds=record["seconds"])
    job.console.say(f"align head: after {settings.steps} steps with frozen blocks, held-out loss {loss:.4f}")


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
    adapt = recipe.adapt.model_copy(update={"zero": layout["zero"], "offload": layout["offload"]})
    rows = job.rows(recipe.adapt.phases[0].resolution).split()[0]
    task = phases.Task(model, job.family, adapt, rows, job.scheduler)
    place = Place(job.folders.align_head / names.TRAINING, job.console, recipe.seed)
    return phases.train_head(task, recipe.align_head, recipe.dtype, layout["micro_batch"], place)


def module_state(job: Job, model: nn.Module) -> dict[str, Tensor]:
    """Embedder and head under the model's own names, float32 on the CPU."""
    wanted = (job.family.embedder, job.family.head)
    return {name: p.detach().float().cpu() for name, p in model.named_parameters() if name.rpartition(".")[0] in wanted}


def heldout_loss(job: Job, task: phases.Task, rows: LatentCache) -> float:
    """Loss of the recipe's objective on held-out rows, mean over fixed quantiles of t."""
    batches = [(list(part), *rows.batch(list(part))) for part in buckets.batches(rows.spans, job.recipe.latents.batch)]
    return objective.evaluate_loss(task.loss(), batches, job.recipe.seed, task.sampling, pipelines.device())["mean"]


def start_head(job: Job, task: phases.Task, kept: Path | None = None) -> None:
    """Fill the head in place: least squares, Xavier or zero; ``kept`` as in `head_equations`."""
    settings = job.recipe.align_head
    head = linear(task.model, job.family.head)
    with torch.no_grad():
        head.weight.zero_()
        if head.bias is not None:
            head.bias.zero_()
        if settings.method == "xavier":
            head.weight.copy_(xavier(head, job.recipe.seed)[0].reshape(head.weight.shape))
        elif settings.method == "least-squares":
            weight, bias = head_equations(job, task, settings.draws, kept).solve(RIDGE, bias=head.bias is not None)
            # A learned-sigma head writes 2 C channels; the stock pipeline drops the second half, which stays zero.
            head.weight[: len(weight)].copy_(weight.reshape(-1, *head.weight.shape[1:]))
            if head.bias is not None:
                head.bias[: len(bias)].copy_(bias)


def head_equations(job: Job, task: phases.Task, draws: int, kept: Path | None = None) -> NormalEquations:
    """Features before the head against the native target of every token, over ``draws`` noise draws per picture.

    Args:
        kept: file that takes the sums every ten minutes. What a run before this one has left there is gone on with.
    """
    rows, family, adapt, device = task.rows, job.family, job.recipe.adapt, pipelines.device()
    captured: list[Tensor] = []
    head = linear(task.model, family.head)
    handle = head.register_forward_pre_hook(lambda _, args: captured.append(args[0].detach()))
    equations, done = NormalEquations(head.weight[0].numel(), rows.shapes[0][0]), (0, 0)  # draw and row to go on with
    if kept and kept.exists():
        equations, done = NormalEquations.load(kept)

    def features(z: Tensor, t: Tensor, text: Text, guidance: Tensor) -> Tensor:
        captured.clear()
        objective.predict(family, task.model, z, t, text, guidance)
        return family.head_inputs(torch.cat(captured), z.shape[2] * z.shape[3], text).float()  # (B, N, K), patch 1

    def add(number: int, part: list[int]) -> None:
        z0, text = rows.batch(part)
        sampling = task.sampling(z0.shape[1:])
        drawn = objective.draw(job.recipe.seed, DRAW_STREAM + number, part, z0.shape[1:], sampling)
        z0, text, drawn = objective.to_device((z0, text, drawn), device)
        z = objective.noised(z0, drawn.eps, drawn.t)
        x = features(z, drawn.t, objective.drop_text(text, rows.null, drawn.dropped), drawn.guidance)
        if adapt.objective == "guidance-corrected":
            nothing = objective.drop_text(text, rows.null, torch.ones_like(drawn.dropped))
            h_null = features(z, drawn.t, nothing, torch.ones_like(drawn.guidance))
            x = objective.corrected(x, h_null, drawn.guidance, adapt.data_guidance)
        goal = family.target(z0, drawn.eps).flatten(2).transpose(1, 2)  # (B, N, C), patch 1
        weight = objective.error_weight(family, drawn.t, adapt.weighting)  # (B,)
        equations.add(x, goal, weight[:, None].expand(goal.shape[:2]))

    try:
        with torch.no_grad(), job.console.progress("least squares for the head", draws * len(rows), "samples") as bar:
            saved = time.monotonic()
            for number in range(draws):
                for part in buckets.batches(rows.spans, job.recipe.latents.batch):
                    if left := [row for row in part if (number, row) >= done]:
                        add(number, left)
                    bar.advance(len(part))
                    if kept and left and time.monotonic() - saved > KEEP_EVERY:
                        equations.save(kept, (number, part[-1] + 1))
                        saved = time.monotonic()
    finally:
        handle.remove()
    return equations
