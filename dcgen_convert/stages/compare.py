"""The source and the bundle side by side: fixed-seed picture grid, and figures where the recipe names a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgen_convert.bundle import loading
from dcgen_convert.bundle.layout import PictureGrid
from dcgen_convert.core.files import replacing
from dcgen_convert.core.journal import Stage
from dcgen_convert.data import images
from dcgen_convert.evaluate.grids import grid
from dcgen_convert.evaluate.metrics import psnr
from dcgen_convert.networks import autoencoders, models, pipelines
from dcgen_convert.stages import captions
from dcgen_convert.stages.job import Job
from dcgen_convert.stages.preview import converted_pipeline

SEED = 104_729  # prompts and noise that no training picture used
ROWS = 8  # of the grid
TITLES = {"source": "the base model", "converted": "this model in 16 bits", "nvfp4": "this bundle (NVFP4)"}
TITLES |= {"int4": "this bundle (INT4)", "round trip": "the base model's picture through the new autoencoder"}


def run(job: Job, stage: Stage, bundle: Path) -> PictureGrid:
    """Writes grid.png (source | converted | round trip of the source, the ceiling) and fills stage.metrics.

    Returns:
        The grid, for the model card.
    """
    count = job.recipe.evaluate.prompts
    texts = captions.others(job, count, job.recipe.seed + SEED)
    seeds = [job.recipe.seed + SEED + i for i in range(count)]
    drawn = {
        "source": _draw(
            job,
            pipelines.load_pipeline(job.source, job.dtype),
            texts,
            seeds,
            job.recipe.data.steps,
            job.recipe.data.guidance,
        )
    }
    steps, guidance = job.recipe.bundle.steps, job.recipe.bundle.guidance
    if job.recipe.quantize.format != "none":
        twin = models.load(job.folders.converted, job.dtype, device=pipelines.device())
        drawn["converted"] = _draw(job, converted_pipeline(job, twin), texts, seeds, steps, guidance)
    name = "converted" if job.recipe.quantize.format == "none" else job.recipe.quantize.format
    runtime = loading.choose_runtime(bundle, "auto", job.dtype)
    if runtime == "dequantised":  # that would leave the activations' 4 bits out of the figures
        runtime = "emulated"
    pipeline, runtime = loading.load(bundle, job.dtype, runtime)
    drawn[name] = _draw(job, pipeline, texts, seeds, steps, guidance)
    stage.metrics["runtime"] = runtime
    codec = autoencoders.load(job.target, device=pipelines.device(), scale=job.recipe.latents.scale_override)
    drawn["round trip"] = torch.cat(
        [codec.decode(codec.encode(part)).cpu() for part in drawn["source"].split(job.recipe.latents.batch)]
    )
    if "converted" in drawn and name != "converted":
        stage.metrics["psnr_quantised_db"] = round(psnr(drawn[name], drawn["converted"], peak=2.0), 2)
    if job.recipe.evaluate.metrics == "tiny-world":
        figures(job, stage, drawn, texts)
    sheet = grid(
        {title: [images.to_image(picture) for picture in part[:ROWS]] for title, part in drawn.items()}, texts[:ROWS]
    )
    file = stage.folder / "grid.png"
    with replacing(file) as temporary:
        sheet.save(temporary, format="PNG")
    return PictureGrid(file, [TITLES.get(title, title) for title in drawn], texts[:ROWS])


def figures(job: Job, stage: Stage, drawn: dict[str, Tensor], texts: list[str]) -> None:
    """Attribute accuracy and Frechet distance of every column."""
    from dcgen_convert.evaluate import tiny_world

    for name, pictures in drawn.items():
        key = name.replace(" ", "_")
        stage.metrics[f"accuracy_{key}"] = round(tiny_world.accuracy(pictures, texts), 4)
        stage.metrics[f"frechet_{key}"] = round(tiny_world.distance(pictures, texts), 2)
    shown = ", ".join(f"{name} {stage.metrics['accuracy_' + name.replace(' ', '_')]:.1%}" for name in drawn)
    job.console.say(f"evaluate: attribute accuracy {shown} on {len(texts)} prompts")


def _draw(job: Job, pipeline: Any, texts: list[str], seeds: list[int], steps: int, guidance: float) -> Tensor:
    parts = []
    for start in range(0, len(texts), job.recipe.data.batch):
        part = slice(start, start + job.recipe.data.batch)
        parts.append(
            pipelines.draw(
                job.family,
                pipeline,
                texts[part],
                seeds[part],
                side=job.resolution,
                steps=steps,
                guidance=guidance,
                length=job.text_length,
            )
        )
    return torch.cat(parts)
