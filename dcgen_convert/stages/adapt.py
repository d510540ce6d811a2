"""Stages `adapt-n` and `merge-n`: one phase of adaptation, then its result is merged into dense weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint import merge
from dcgen_convert.core import names
from dcgen_convert.core.files import copy_file
from dcgen_convert.core.journal import Stage
from dcgen_convert.networks import models
from dcgen_convert.planning import plan
from dcgen_convert.planning.start import start_phase
from dcgen_convert.stages import allowance, gap, grid, watched
from dcgen_convert.stages.job import Job
from dcgen_convert.stages.layout import first_device, fitted
from dcgen_convert.stages.watched import Watched
from dcgen_convert.train import phases
from dcgen_convert.train.loop import Place
from dcgen_convert.train.watch import Intervals


def adapt_phase(job: Job, stage: Stage, number: int) -> None:
    """Writes export/ (LoRA, embedder, head), checkpoints and metrics.jsonl; reports losses and the per-block gap."""
    phase = job.recipe.adapt.phases[number - 1]
    layout = {**fitted(job, phase, "adapt"), "start": _layout_of_start(job, number)}
    seconds = allowance.seconds(job, number)
    with job.crew.share("adapt", expert=job.expert.name, number=number, layout=layout, seconds=seconds):
        record = train_phase(job, number, layout, seconds)
    record.pop("exports")
    stage.metrics.update(record)
    if found := watched.found(job, number, record):
        stage.metrics["verdicts"] = found
    before, after = record["evaluation"]["before"]["mean"], record["evaluation"]["after"]["mean"]
    job.console.say(
        f"adapt {number}: {phase.mode}, {record['steps']} steps at {phase.resolution} px, held-out loss "
        f"{before:.4f} -> {after:.4f}"
    )
    for text in found:
        job.console.say(f"adapt {number}: {text}")


def train_phase(job: Job, number: int, layout: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """Train phase ``number``, on every rank, with the layout that rank 0 chose: zero, offload, micro_batch.

    Args:
        layout: its "start" is the layout in which the start of LoRA is to be found; empty: it is there; None: none.
        seconds: that it may take from now on; None: as long as its steps take.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    recipe, folder = job.recipe, job.folders.adapt(number)
    phase = recipe.adapt.phases[number - 1]
    rows, held_out = job.of_phase(number).rows(phase.resolution).split()
    aligned = job.folders.align_head / names.MODULES if number == 1 else None

    def task_in(layout: dict[str, Any]) -> phases.Task:
        model = models.load(job.folders.dense_before(number), job.dtype, aligned, first_device(layout))
        adapt = recipe.adapt.model_copy(update={"zero": layout["zero"], "offload": layout["offload"]})
        return phases.Task(model, job.family, adapt, rows, job.scheduler, within=job.expert.within)

    begins = layout.get("start")
    if begins:
        first = start_phase(recipe, job.crew.world).model_copy(update={"micro_batch": begins["micro_batch"]})
        phases.find_start(task_in(begins), first, phase.rank, recipe.dtype, Place(folder, job.console, recipe.seed))
    task = task_in(layout)
    if recipe.compile and layout["zero"] < 3:
        models.compile_blocks(job.family, task.model)
    looking = Watched(job, number)
    drawing = grid.drawing(job, held_out, folder, looking)
    intervals = Intervals(recipe.watch.evaluate_every, recipe.watch.grid_every, drawing, looking.look)
    place = Place(folder, job.console, recipe.seed, held_out=held_out, intervals=intervals, deadline=deadline)
    phase = phase.model_copy(update={"micro_batch": layout["micro_batch"]})
    return phases.adapt_phase(task, phase, recipe.dtype, place, None if begins is None else _start_file(job, number))


def _start_file(job: Job, number: int) -> Path:
    return job.folders.adapt(number) / names.CHECKPOINTS / names.LORA_START


def _layout_of_start(job: Job, number: int) -> dict[str, Any] | None:
    """The layout in which the start of LoRA is found; empty when it is there, None when LoRA begins at zero."""
    if not job.recipe.starts_along_gradient(number):
        return None
    if _start_file(job, number).exists():
        return {}
    held = plan.start_bytes(job.recipe, job.identity)
    return fitted(job, start_phase(job.recipe, job.crew.world), "LoRA start", held)


def merge_phase(job: Job, stage: Stage, number: int) -> None:
    """Writes transformer/ with the phase merged; the last LoRA stays apart when the recipe says so."""
    export, merged = job.folders.adapt(number) / names.EXPORT, stage.folder / models.TRANSFORMER
    phase, last = job.recipe.adapt.phases[number - 1], number == len(job.recipe.adapt.phases)
    lora = None if phase.mode == "full" else export / names.LORA
    if lora and last and not job.recipe.merge_lora:
        copy_file(lora, stage.folder / names.LORA)
        lora = None
    dense, modules = job.folders.dense_before(number), export / names.MODULES
    stage.metrics.update(merge.merge(dense, merged, lora=lora, modules=modules, console=job.console))
    shown = job.alignment
    held_out = job.of_phase(1).rows(shown.resolution).paired().split()[1]
    stage.metrics["gap"] = gap.measure(job, merged, held_out, stage.folder)
    stage.metrics.update(gap_side=shown.resolution, gap_base_side=shown.side)
