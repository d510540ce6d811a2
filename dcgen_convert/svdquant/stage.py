"""Quantising with calibration on the model's own trajectories: the stage `quantize`, and the verb for models as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dcgen_convert import catalog, models, pipelines
from dcgen_convert.bundle.components import copy_component, copy_file
from dcgen_convert.bundle.layout import check_disk, check_output, is_component
from dcgen_convert.checkpoint.source import load_source
from dcgen_convert.data import make, prompts
from dcgen_convert.errors import InputError
from dcgen_convert.evaluate.preview import converted_pipeline
from dcgen_convert.families import Family, QuantTargets
from dcgen_convert.files import atomic_save, read_json, write_json
from dcgen_convert.journal import Stage
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.settings import Settings
from dcgen_convert.train.stages import converted

PROMPT_SEED = 7_919  # calibration prompts and noise are not those of the training pictures
BATCH = 4  # pictures drawn at once by the verb


def run(job, stage: Stage) -> None:
    """Writes calls/ (inputs of the transformer), transformer/ (4-bit) and layers.json (format, errors, per layer)."""
    recipe = job.recipe
    model = models.load(converted(job), job.dtype, device=pipelines.device())
    targets = plan_targets(job.family, model, recipe.quantize.dense)
    calls = stage.folder / "calls"
    if not (calls / "done.json").exists():
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
    settings = Settings(
        precision=recipe.quantize.format, rank=recipe.quantize.rank, seed=recipe.seed, device=pipelines.device()
    )
    records = quantize(
        converted(job), stage.folder / models.TRANSFORMER, targets, settings, read_calls(calls), job.console
    )
    write_json(stage.folder / "layers.json", records)
    stage.metrics.update(
        format=settings.precision,
        rank=settings.rank,
        svdq=len(targets.svdq),
        awq=len(targets.awq),
        skipped=targets.skipped,
    )


def plan_targets(family: Family, model: torch.nn.Module, dense: str | None) -> QuantTargets:
    """The linears to quantise; InputError when a shape rules one out and the recipe does not keep it dense."""
    linears = {
        name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    targets = family.quant_targets(linears, dense)
    impossible = {path: reason for path, reason in targets.skipped.items() if not reason.startswith("kept dense")}
    if impossible:
        path, reason = next(iter(impossible.items()))
        raise InputError(
            f"{len(impossible)} linears cannot be quantised, first {path}: {reason}",
            "keep them 16-bit with --set quantize.dense=REGEX, or --quantize none",
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


def quantize_source(name: str, output: Path, settings: Any, console) -> dict[str, Any]:
    """Quantise a pipeline as it is: ``output`` is its copy with a 4-bit transformer. Result: bundle, layers.

    Args:
        name: catalogue name, folder or hub id.
        settings: recipe section ``quantize`` (format, rank, calibration, dense).
    """
    check_output(output, force=False)
    entry = catalog.find_source(name)
    source = load_source(
        name, str(entry.folder or entry.repo) if entry else name, revision=entry.revision if entry else None
    )
    check_disk(output, [source.root / part for part, value in source.index.items() if is_component(value)])
    model = models.load(source.transformer, torch.bfloat16, device=pipelines.device())
    targets = plan_targets(source.family, model, settings.dense)
    staging = output.parent / f".{output.name}.partial"  # kept when the work is cut off: the next call goes on from it
    calls = staging / "calls"
    if not (calls / "done.json").exists():
        family, pipeline = source.family, pipelines.load_pipeline(source, torch.bfloat16, transformer=model)
        classes = make.class_names(source)
        texts = prompts.make("builtin", settings.calibration.prompts, 0, classes)
        call = dict(
            side=default_side(pipeline),
            steps=settings.calibration.steps or family.default_steps,
            guidance=family.default_guidance,
        )
        record_calls(calls, family, pipeline, texts, 0, BATCH, console, **call, length=family.text_length)
    chosen = Settings(precision=settings.format, rank=settings.rank, device=pipelines.device())
    folder = staging / "bundle"
    if not (folder / models.TRANSFORMER / "config.json").exists():
        folder.mkdir(exist_ok=True)
        records = quantize(source.transformer, folder / models.TRANSFORMER, targets, chosen, read_calls(calls), console)
        write_json(staging / "layers.json", records)
    for part, value in source.index.items():
        if is_component(value) and part != models.TRANSFORMER:
            shutil.rmtree(folder / part, ignore_errors=True)  # of a call that was cut off
            copy_component(source.root / part, folder / part, console, label=part)
    for path in source.root.iterdir():
        if path.is_file() and path.suffix in (".json", ".md", ".txt", ""):
            copy_file(path, folder / path.name)
    os.replace(folder, output)  # an empty folder in its place is allowed, and replaced
    layers = read_json(staging / "layers.json")
    shutil.rmtree(staging)
    return {
        "bundle": str(output),
        "metrics": {"format": chosen.precision, "svdq": len(targets.svdq), "awq": len(targets.awq)},
        "layers": layers,
    }


def default_side(pipeline: Any) -> int:
    """Picture side in px that the pipeline draws when it is not told."""
    size = getattr(pipeline, "default_sample_size", None) or pipeline.transformer.config.sample_size
    factor = getattr(pipeline, "vae_scale_factor", None) or 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return int(size * factor)
