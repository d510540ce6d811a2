"""Stage `quantize`: SVDQuant with calibration on the converted model's own trajectories."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json, replacing, write_json
from dcgen_convert.core.journal import Stage
from dcgen_convert.data import prompts
from dcgen_convert.families import Family, QuantTargets
from dcgen_convert.families.base import by_kind
from dcgen_convert.networks import models, pipelines
from dcgen_convert.stages import pictures
from dcgen_convert.stages.adapt import converted
from dcgen_convert.stages.preview import converted_pipeline
from dcgen_convert.svdquant import trees
from dcgen_convert.svdquant.assemble import RECORDS
from dcgen_convert.svdquant.nunchaku import export_nunchaku
from dcgen_convert.svdquant.quantize import open_job, quantize, work
from dcgen_convert.svdquant.settings import Settings, container_problem
from dcgen_convert.svdquant.skeleton import build

PROMPT_SEED = 7_919  # calibration prompts and noise are not those of the training pictures
SINGLE_FILE = "nunchaku.safetensors"  # the classic container, beside the folder that it is derived from
CONVERTED_PATCH = 1
CALLS, DONE = "calls", "done.json"


def run(job, stage: Stage) -> None:
    """Writes calls/ (inputs of the transformer) and transformer/ (4-bit, with the record of every layer)."""
    recipe = job.recipe
    targets = plan_targets(job.family, read_json(converted(job) / "config.json"), recipe.quantize.dense)
    calls = stage.folder / CALLS
    if not (calls / DONE).exists():
        count = recipe.quantize.calibration.prompts
        with job.console.progress("calibration", count, "prompts") as bar, job.crew.share("calibration", bar):
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
    """Settings for the recipe section ``quantize``. The classic container fuses q, k and v, which must then share."""
    return Settings(
        precision=section.format,
        rank=section.rank,
        seed=seed,
        device=pipelines.device(),
        share=section.share or section.container == "nunchaku",
    )


def check_container(section: Any, family: Family) -> None:
    """InputError when ``quantize.container`` is not written for this family."""
    problem = container_problem(section.container, family.name)
    if section.format != "none" and problem:
        raise InputError(problem, "use the diffusers container (quantize.container=diffusers)")


def plan_targets(family: Family, config: dict[str, Any], dense: str | None) -> QuantTargets:
    """The linears to quantise, from a transformer's config; no weights.

    Raises:
        InputError: naming every kind of linear whose shape the format cannot hold and the recipe does not keep dense.
    """
    linears = {
        name: (layer.out_features, layer.in_features)
        for name, layer in build(config).named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    targets = family.quant_targets(linears, dense)
    if targets.impossible:
        kinds = "; ".join(f"{name}: {reason}" for name, reason in by_kind(targets.impossible).items())
        raise InputError(
            f"{len(targets.impossible)} linears cannot be quantised: {kinds}",
            "keep them 16-bit with --set quantize.dense=REGEX (quantize: --dense REGEX), or --quantize none",
        )
    if not targets.svdq:
        raise InputError(f"no linear of this {family.name} model can be quantised to 4 bits", "use --quantize none")
    return targets


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


def record_calls(
    folder: Path,
    family: Family,
    pipeline: Callable[[], Any],
    texts: Sequence[str],
    seed: int,
    batch: int,
    bar: Any,
    share: tuple[int, int] = (0, 1),
    **call: Any,
) -> None:
    """What the transformer is given while it draws ``texts``: one file of `trees` per forward call.

    Args:
        pipeline: makes the pipeline; not called when all is there. It is gone afterwards: quantising needs the memory.
        share: (rank, ranks): of the batches this draws every ``ranks``-th. Those that are there are not drawn again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, ranks = share
    starts = [start for number, start in enumerate(range(0, len(texts), batch)) if number % ranks == rank]
    missing = [start for start in starts if not (folder / f"drawn-{start:05d}.json").exists()]
    bar.advance(sum(min(batch, len(texts) - start) for start in starts if start not in missing))
    if not missing:
        return
    given: list[Path] = []  # by the batch in work
    drawing = pipeline()

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)  # some pipelines pass the latents by position
        given.append(folder / f"call-{start:05d}-{len(given):05d}.safetensors")
        with replacing(given[-1]) as temporary:
            trees.save(bound.arguments, temporary)

    handle = drawing.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for start in missing:
            given.clear()
            part = texts[start : start + batch]
            pipelines.draw(family, drawing, part, [seed + PROMPT_SEED + start + i for i in range(len(part))], **call)
            write_json(folder / f"drawn-{start:05d}.json", {"calls": len(given)})
            bar.advance(len(part))
    finally:
        handle.remove()


def read_calls(folder: Path) -> list[Path]:
    """The recorded calls, in order."""
    return sorted(folder.glob("call-*.safetensors"))
