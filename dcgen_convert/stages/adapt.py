"""Stages `adapt-n` and `merge-n`: one phase of adaptation, then its result folded into dense weights for the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint import merge
from dcgen_convert.core.files import copy_file
from dcgen_convert.core.journal import Stage
from dcgen_convert.networks import models, pipelines
from dcgen_convert.stages import gap, grid
from dcgen_convert.stages.job import dense_before
from dcgen_convert.train import adapt
from dcgen_convert.train.layout import first_device, fitted
from dcgen_convert.train.lora import LORA_FILE, MODULES_FILE
from dcgen_convert.train.watch import Intervals

EXPORT = "export"


def adapt_phase(job, stage: Stage, number: int) -> None:
    """Writes export/ (LoRA, embedder, head), checkpoints and metrics.jsonl; reports losses and the per-block gap."""
    phase = job.recipe.adapt.phases[number - 1]
    layout = fitted(job, phase, "adapt")
    with job.crew.share("adapt", number=number, layout=layout):
        record = train_phase(job, number, layout)
    record.pop("exports")
    stage.metrics.update(record)
    before, after = record["evaluation"]["before"]["mean"], record["evaluation"]["after"]["mean"]
    job.console.say(
        f"adapt {number}: {phase.mode}, {phase.steps} steps at {phase.resolution} px, held-out loss {before:.4f} -> "
        f"{after:.4f}"
    )


def train_phase(job, number: int, layout: dict[str, Any]) -> dict[str, Any]:
    """Phase ``number`` on every rank, in the layout that rank 0 chose: zero, offload, micro_batch."""
    phase = job.recipe.adapt.phases[number - 1]
    rows, held_out = job.rows(phase.resolution).split()
    aligned = job.folder("align-head") / models.MODULES if number == 1 else None
    model = models.load(dense_before(job, number), job.dtype, aligned, first_device(layout))
    return adapt.adapt_phase(
        model,
        job.family,
        phase.model_copy(update={"micro_batch": layout["micro_batch"]}),
        job.recipe.adapt.model_copy(update={"zero": layout["zero"], "offload": layout["offload"]}),
        rows,
        job.folder(f"adapt-{number}"),
        scheduler=job.scheduler,
        dtype=job.recipe.dtype,
        console=job.console,
        seed=job.recipe.seed,
        held_out=held_out,
        intervals=Intervals(
            job.recipe.watch.evaluate_every,
            job.recipe.watch.grid_every,
            grid.drawing(job, held_out, job.folder(f"adapt-{number}")),
        ),
    )


def merge_phase(job, stage: Stage, number: int) -> None:
    """Writes transformer/ with the phase merged; the last LoRA stays apart when the recipe says so."""
    export = job.folder(f"adapt-{number}") / EXPORT
    last = number == len(job.recipe.adapt.phases)
    lora: Path | None = export / LORA_FILE
    if job.recipe.adapt.phases[number - 1].mode == "full":
        lora = None
    if last and not job.recipe.merge_lora:
        copy_file(lora, stage.folder / LORA_FILE)
        lora = None
    record = merge.merge(
        dense_before(job, number),
        stage.folder / models.TRANSFORMER,
        lora=lora,
        modules=export / MODULES_FILE,
        console=job.console,
    )
    stage.metrics.update(record)
    model = models.load(stage.folder / models.TRANSFORMER, job.dtype, device=pipelines.device())
    resolution = job.recipe.adapt.phases[number - 1].resolution
    stage.metrics["gap"] = gap.measure(job, model, job.rows(resolution).split()[1])
