"""Stage `quantize`: SVDQuant with calibration on what the converted model itself is given while it draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcgen_convert.core import names
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.core.journal import Stage
from dcgen_convert.families import Family, QuantTargets
from dcgen_convert.families.quant_targets import CONTAINERS, by_kind
from dcgen_convert.networks import models, pipelines
from dcgen_convert.recipe.schema import Quantize
from dcgen_convert.stages import captions, edited
from dcgen_convert.stages.job import Job
from dcgen_convert.stages.preview import converted_pipeline
from dcgen_convert.svdquant.nunchaku import export_nunchaku
from dcgen_convert.svdquant.quantisation import Quantisation
from dcgen_convert.svdquant.quantize import quantize, work
from dcgen_convert.svdquant.record import CALLS, DONE, PROMPT_SEED, CalibrationSet, read_calls, record_calls
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.targets import plan_targets

if TYPE_CHECKING:
    from dcgen_convert.core.progress import Bar

SINGLE_FILE = "nunchaku.safetensors"  # the classic container, beside the folder that it is derived from
CONVERTED_PATCH = 1


def run(job: Job, stage: Stage) -> None:
    """Writes calls/ (inputs of the transformer) and transformer/ (4-bit, with the record of every layer)."""
    section, calls, transformer = job.recipe.quantize, stage.folder / CALLS, stage.folder / models.TRANSFORMER
    targets, settings = _targets(job), settings_of(section, job.recipe.seed)
    pictures = calibration_set(job)
    batches = pictures.missing(calls)
    if batches or not (calls / DONE).exists():
        count = section.calibration.prompts
        with (
            job.console.progress("calibration", count, "prompts") as bar,
            job.crew.share("calibration", bar, together=False, batches=batches),
        ):
            bar.advance(count - sum(last - first for first, last in batches))
            record_part(job, bar, batches)
        write_json(calls / DONE, {"calls": len(read_calls(calls))})
    if not transformer.exists():  # it is whole, or it is not there
        quantize(job.folders.converted, transformer, targets, settings, read_calls(calls), job.console, job.crew)
    if section.container == "nunchaku":
        export_nunchaku(transformer, stage.folder / SINGLE_FILE, CONVERTED_PATCH)
    stage.metrics.update(measured(transformer, targets, settings))


def quantize_part(job: Job, bar: Bar, **begun: Any) -> None:
    """This rank's part of the blocks, of the quantisation that rank 0 has begun."""
    folder, settings = job.folders.quantize, settings_of(job.recipe.quantize, job.recipe.seed)
    inputs = (_targets(job), settings, read_calls(folder / CALLS))
    quantisation = Quantisation.of_folder(job.folders.converted, folder / models.TRANSFORMER, *inputs)
    work(quantisation, job.console, bar, (job.crew.rank, job.crew.world), **begun)


def calibration_set(job: Job) -> CalibrationSet:
    """The pictures that the converted model draws for its calibration."""
    recipe, section = job.recipe, job.recipe.quantize.calibration
    seed = recipe.seed + PROMPT_SEED
    return CalibrationSet(
        texts=captions.others(job, section.prompts, seed),
        seed=recipe.seed,
        batch=section.batch or recipe.data.batch,
        side=job.resolution,
        steps=section.steps or recipe.bundle.steps,
        guidance=recipe.bundle.guidance,
        length=job.text_length,
        references=edited.of_prompts(edited.judging(job), section.prompts, seed, job.folders.quantize / edited.FOLDER),
    )


def record_part(job: Job, bar: Bar, batches: Sequence[Sequence[int]]) -> None:
    """Record the calls of this rank's part of the missing batches."""

    def pipeline() -> Any:
        return converted_pipeline(job, models.load(job.folders.converted, job.dtype, device=pipelines.device()))

    own = [(first, last) for first, last in batches[job.crew.rank :: job.crew.world]]
    warn = job.console.warn
    record_calls(job.folders.quantize / CALLS, job.family, pipeline, calibration_set(job), bar, own, warn)


def measured(transformer: Path, targets: QuantTargets, settings: QuantSettings) -> dict[str, Any]:
    """What manifest and report say of a finished 4-bit folder: settings, counts, and the record of every layer."""
    return {
        "format": settings.precision,
        "rank": settings.rank,
        "svdq": len(targets.svdq),
        "awq": len(targets.awq),
        "skipped": by_kind(targets.skipped),
        "layers": read_json(transformer / names.RECORDS)["layers"],
    }


def settings_of(section: Quantize, seed: int) -> QuantSettings:
    """Settings for the recipe section ``quantize``. The classic container stores q, k and v as one layer. Without a
    branch the rank is 0.
    """
    return QuantSettings(
        precision=section.format,
        rank=section.rank if CONTAINERS[section.container].branch else 0,
        seed=seed,
        device=pipelines.device(),
        fuse_qkv=section.fuse_qkv or section.container == "nunchaku",
    )


def targets_of(family: Family, config: dict[str, Any], section: Quantize) -> QuantTargets:
    """`plan_targets` for the recipe section ``quantize``."""
    return plan_targets(family, config, section.dense, section.container, section.format)


def _targets(job: Job) -> QuantTargets:
    return targets_of(job.family, read_json(job.folders.converted / "config.json"), job.recipe.quantize)
