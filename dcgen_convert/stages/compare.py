"""The source and the bundle side by side: fixed-seed picture grid, and figures where the recipe names a judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgen_convert.bundle import loading
from dcgen_convert.bundle.layout import PictureGrid
from dcgen_convert.core import clock
from dcgen_convert.core.console import Console
from dcgen_convert.core.files import replacing
from dcgen_convert.core.journal import Stage
from dcgen_convert.data import images
from dcgen_convert.evaluate.grids import grid
from dcgen_convert.evaluate.metrics import psnr
from dcgen_convert.families import Family
from dcgen_convert.families.grid import Grid
from dcgen_convert.networks import autoencoders, models, pipelines
from dcgen_convert.networks.at_once import AtOnce, release
from dcgen_convert.recipe.drawable import own_side
from dcgen_convert.stages import captions, source_pipeline
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
    settings, steps, guidance = job.recipe.data, job.recipe.bundle.steps, job.recipe.bundle.guidance
    sheet = Comparison(job.family, texts, seeds, job.resolution, job.text_length, settings.batch, job.console)
    own = own_side(job.identity, Grid(job.ae.factor, job.ae.channels, 1), job.resolution)
    if own != job.resolution:
        job.console.say(f"verify: the base model draws at {own} px, as it was not trained on {job.resolution} px")
    source = partial(source_pipeline.load, job.source, job.dtype)
    with clock.renamed({"draw": "draw with the source"}):
        drawn = {"source": replace(sheet, side=own).draw(source, settings.steps, settings.guidance)}
    if job.recipe.quantize.format != "none":
        with clock.renamed({"draw": "draw in 16 bits"}):
            drawn["converted"] = sheet.draw(lambda: _twin(job), steps, guidance)
    name = "converted" if job.recipe.quantize.format == "none" else job.recipe.quantize.format
    runtime = runtime_of(bundle, job.dtype)
    with clock.renamed({"draw": "draw with the bundle"}):
        drawn[name] = sheet.draw(lambda: loading.load(bundle, job.dtype, runtime)[0], steps, guidance)
    stage.metrics["runtime"] = runtime
    scale, device = job.recipe.latents.scale_override, pipelines.device()
    codec = autoencoders.load(job.target, device=device, scale=scale, console=job.console)
    parts = drawn["source"].split(job.recipe.latents.batch)
    with clock.timed("round trip", count):
        drawn["round trip"] = torch.cat([codec.decode(codec.encode(part)) for part in parts])
    if "converted" in drawn and name != "converted":
        stage.metrics["psnr_quantised_db"] = round(psnr(drawn[name], drawn["converted"], peak=2.0), 2)
    if job.recipe.evaluate.metrics == "tiny-world":
        figures(job, stage, drawn, texts)
    return written(drawn, texts, stage.folder / "grid.png")


def written(drawn: dict[str, Tensor], texts: list[str], file: Path) -> PictureGrid:
    """Write the first ROWS pictures of every column to ``file``."""
    columns = {title: [images.to_image(picture) for picture in part[:ROWS]] for title, part in drawn.items()}
    with replacing(file) as temporary:
        grid(columns, texts[:ROWS]).save(temporary, format="PNG")
    return PictureGrid(file, [TITLES.get(title, title) for title in drawn], texts[:ROWS])


def runtime_of(bundle: Path, dtype: torch.dtype) -> str:
    """How a bundle is judged: as its kernels compute, or as an emulation of them does."""
    runtime = loading.choose_runtime(bundle, "auto", dtype)
    return "emulated" if runtime == "dequantised" else runtime  # else the activations' 4 bits would be left out


def figures(job: Job, stage: Stage, drawn: dict[str, Tensor], texts: list[str]) -> None:
    """Attribute accuracy and Frechet distance of every column; of large pictures that of their parts too."""
    from dcgen_convert.evaluate import tiny_world
    from dcgen_convert.tiny import world

    for name, pictures in drawn.items():
        key = name.replace(" ", "_")
        stage.metrics[f"accuracy_{key}"] = round(tiny_world.accuracy(pictures, texts), 4)
        stage.metrics[f"frechet_{key}"] = round(tiny_world.distance(pictures, texts), 2)
        if pictures.shape[-1] >= 2 * world.SIDE:
            stage.metrics[f"crops_frechet_{key}"] = round(tiny_world.distance_of_crops(pictures, texts), 2)
    shown = ", ".join(f"{name} {stage.metrics['accuracy_' + name.replace(' ', '_')]:.1%}" for name in drawn)
    job.console.say(f"evaluate: attribute accuracy {shown} on {len(texts)} prompts")


def _twin(job: Job) -> Any:
    """The pipeline of the converted model in 16 bits."""
    return converted_pipeline(job, models.load(job.folders.converted, job.dtype, device=pipelines.device()))


@dataclass(frozen=True)
class Comparison:
    """The pictures that several pipelines draw: prompts with their seeds, side in px, text tokens, pictures at once."""

    family: Family
    texts: list[str]
    seeds: list[int]
    side: int
    length: int
    batch: int
    console: Console

    def draw(self, load: Callable[[], Any], steps: int, guidance: float) -> Tensor:
        """The pictures of one pipeline. What ``load`` returns is freed before the next one is loaded."""
        drawn = self._drawn(load(), steps, guidance)
        release()
        return drawn

    def _drawn(self, pipeline: Any, steps: int, guidance: float) -> Tensor:
        def part(places: range) -> Tensor:
            return pipelines.draw(
                self.family,
                pipeline,
                [self.texts[place] for place in places],
                [self.seeds[place] for place in places],
                side=self.side,
                steps=steps,
                guidance=guidance,
                length=self.length,
            )

        drawing = AtOnce("verify: drawing", self.console.warn)
        return torch.cat(list(drawing.parts(range(len(self.texts)), part, self.batch)))
