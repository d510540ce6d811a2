"""Stage `quantize`: SVDQuant with calibration on the converted model's own trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.core.journal import Stage
from dcgen_convert.data import prompts
from dcgen_convert.families import QuantTargets
from dcgen_convert.families.base import by_kind
from dcgen_convert.networks import models, pipelines
from dcgen_convert.stages import pictures
from dcgen_convert.stages.job import converted
from dcgen_convert.stages.preview import converted_pipeline
from dcgen_convert.svdquant.assemble import RECORDS
from dcgen_convert.svdquant.nunchaku import export_nunchaku
from dcgen_convert.svdquant.quantize import open_job, quantize, work
from dcgen_convert.svdquant.record import CALLS, DONE, PROMPT_SEED, read_calls, record_calls
from dcgen_convert.svdquant.settings import Settings
from dcgen_convert.svdquant.targets import plan_targets

SINGLE_FILE = "nunchaku.safetensors"  # the classic container, beside the folder that it is derived from
CONVERTED_PATCH = 1


def run(job, stage: Stage) -> None:
    """Writes calls/ (inputs of the transformer) and transformer/ (4-bit, with the record of every layer)."""
    recipe = job.recipe
    targets = plan_targets(job.family, read_json(converted(job) / "config.json"), recipe.quantize.dense)
    calls = stage.folder / CALLS
    if not (calls / DONE).exists():
        count = recipe.quantize.calibration.prompts
        with (
            job.console.progress("calibration", count, "prompts") as bar,
            job.crew.share("calibration", bar, together=False),
        ):
            record_share(job, bar)
        write_json(calls / DONE, {"calls": len(read_calls(calls))})
    settings = settings_of(recipe.quantize, recipe.seed)
    transformer = stage.folder / models.TRANSFORMER
    if not transformer.exists():  # whole or absent
        quantize(converted(job), transformer, targets, settings, read_calls(calls), job.console, job.crew)
    if recipe.quantize.container == "nunchaku":
        export_nunchaku(transformer, stage.folder / SINGLE_FILE, CONVERTED_PATCH)
    stage.metrics.update(measured(transformer, targets, settings))


def quantize_share(job, bar, **begun: Any) -> None:
    """This rank's part of the blocks, of the quantisation that rank 0 has begun."""
    section, folder = job.recipe.quantize, job.folder("quantize")
    targets = plan_targets(job.family, read_json(converted(job) / "config.json"), section.dense)
    settings = settings_of(section, job.recipe.seed)
    begun_job = open_job(converted(job), folder / models.TRANSFORMER, targets, settings, read_calls(folder / CALLS))
    work(begun_job, job.console, bar, (job.crew.rank, job.crew.world), **begun)


def measured(transformer: Path, targets: QuantTargets, settings: Settings) -> dict[str, Any]:
    """What manifest and report say of a finished 4-bit folder: settings, counts, and the record of every layer."""
    return {
        "format": settings.precision,
        "rank": settings.rank,
        "svdq": len(targets.svdq),
        "awq": len(targets.awq),
        "skipped": by_kind(targets.skipped),
        "layers": read_json(transformer / RECORDS)["layers"],
    }


def settings_of(section: Any, seed: int) -> Settings:
    """Settings for the recipe section ``quantize``. The classic container stores q, k and v as one layer."""
    return Settings(
        precision=section.format,
        rank=section.rank,
        seed=seed,
        device=pipelines.device(),
        fuse_qkv=section.fuse_qkv or section.container == "nunchaku",
    )


def record_share(job, bar) -> None:
    """Record what is missing among this rank's calls. A batch's calls do not depend on who draws it."""
    recipe, section = job.recipe, job.recipe.quantize.calibration
    texts = prompts.make(
        recipe.data.prompts, section.prompts, recipe.seed + PROMPT_SEED, pictures.class_names(job.source)
    )
    call = dict(
        side=job.resolution,
        steps=section.steps or recipe.bundle.steps,
        guidance=recipe.bundle.guidance,
        length=job.text_length,
    )

    def pipeline() -> Any:
        return converted_pipeline(job, models.load(converted(job), job.dtype, device=pipelines.device()))

    batch, share = section.batch or recipe.data.batch, (job.crew.rank, job.crew.world)
    record_calls(job.folder("quantize") / CALLS, job.family, pipeline, texts, recipe.seed, batch, bar, share, **call)
