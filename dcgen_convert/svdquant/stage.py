"""Stage `quantize`: SVDQuant with calibration on the converted model's own trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dcgen_convert import models, pipelines
from dcgen_convert.data import make, prompts
from dcgen_convert.errors import InputError
from dcgen_convert.evaluate.preview import converted_pipeline
from dcgen_convert.families import Family, QuantTargets
from dcgen_convert.families.base import by_kind
from dcgen_convert.files import atomic_save, read_json, write_json
from dcgen_convert.journal import Stage
from dcgen_convert.svdquant.assemble import timeless
from dcgen_convert.svdquant.nunchaku import export_nunchaku
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.settings import Settings
from dcgen_convert.svdquant.skeleton import build
from dcgen_convert.train.stages import converted

PROMPT_SEED = 7_919  # calibration prompts and noise are not those of the training pictures
SINGLE_FILE = "nunchaku.safetensors"  # the classic container, beside the folder that it is derived from
CONVERTED_PATCH = 1


def run(job, stage: Stage) -> None:
    """Writes calls/ (inputs of the transformer), transformer/ (4-bit) and layers.json (format, errors, per layer)."""
    recipe = job.recipe
    targets = plan_targets(job.family, read_json(converted(job) / "config.json"), recipe.quantize.dense)
    calls = stage.folder / "calls"
    if not (calls / "done.json").exists():
        model = models.load(converted(job), job.dtype, device=pipelines.device())
        texts = prompts.make(
            recipe.data.prompts,
            recipe.quantize.calibration.prompts,
            recipe.seed + PROMPT_SEED,
            make.class_names(job.source),
        )
        call = dict(
            side=job.resolution,
            steps=recipe.quantize.calibration.steps or recipe.bundle.steps,
            guidance=recipe.bundle.guidance,
            length=job.text_length,
        )
        record_calls(
            calls,
            job.family,
            converted_pipeline(job, model),
            texts,
            recipe.seed,
            recipe.data.batch,
            job.console,
            **call,
        )
        del model  # from here on one block at a time
    settings = settings_of(recipe.quantize, recipe.seed)
    records = quantize(
        converted(job), stage.folder / models.TRANSFORMER, targets, settings, read_calls(calls), job.console
    )
    write_json(stage.folder / "layers.json", records)
    if recipe.quantize.container == "nunchaku":
        export_nunchaku(stage.folder / models.TRANSFORMER, stage.folder / SINGLE_FILE, CONVERTED_PATCH)
    stage.metrics.update(
        format=settings.precision,
        rank=settings.rank,
        svdq=len(targets.svdq),
        awq=len(targets.awq),
        skipped=by_kind(targets.skipped),
        layers=[timeless(record) for record in records],
    )


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
    if section.format != "none" and section.container == "nunchaku" and family.name != "flux":
        raise InputError(
            f"the classic nunchaku container is written for FLUX.1 only, not for {family.name}",
            "use the diffusers container (quantize.container=diffusers)",
        )


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


def record_calls(
    folder: Path, family: Family, pipeline: Any, texts: Sequence[str], seed: int, batch: int, console, **call: Any
) -> None:
    """What the transformer is given while it draws ``texts``: one safetensors file per forward call, then done.json."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal count
        given = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
        if args:  # SANA and DiT pipelines pass the latents by position
            given["hidden_states"] = args[0]
        atomic_save(
            {key: value.detach().cpu() for key, value in given.items()}, folder / f"call-{count:05d}.safetensors"
        )
        count += 1

    handle = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with console.progress("calibration", len(texts), "prompts") as bar:
            for start in range(0, len(texts), batch):
                part = texts[start : start + batch]
                pipelines.draw(
                    family, pipeline, part, [seed + PROMPT_SEED + start + i for i in range(len(part))], **call
                )
                bar.advance(len(part))
    finally:
        handle.remove()
    write_json(folder / "done.json", {"calls": count})


def read_calls(folder: Path) -> list[Path]:
    """The recorded calls, in order."""
    return sorted(folder.glob("call-*.safetensors"))
