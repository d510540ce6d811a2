"""The source and the bundle side by side: fixed-seed picture grid, and figures where the recipe names a judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dcgen_convert.bundle import loading
from dcgen_convert.bundle.layout import PictureGrid
from dcgen_convert.core import clock
from dcgen_convert.core.console import Console
from dcgen_convert.core.files import TEMPORARY, replacing
from dcgen_convert.core.journal import Stage
from dcgen_convert.data import contents, images
from dcgen_convert.data.buckets import Size
from dcgen_convert.evaluation import tiny_edits, tiny_videos, tiny_world
from dcgen_convert.evaluation.grids import cell, grid, strips
from dcgen_convert.evaluation.metrics import psnr_of
from dcgen_convert.evaluation.rows import BASE, CEILING, CONVERTED, FLOOR, OTHER
from dcgen_convert.families import Family, pixel_memory
from dcgen_convert.networks import models, pipelines
from dcgen_convert.networks.at_once import AtOnce, release
from dcgen_convert.recipe.drawable import own_side
from dcgen_convert.stages import captions, edited, judged, precision, source_pipeline
from dcgen_convert.stages.grid import frames_of, shown
from dcgen_convert.stages.job import Job
from dcgen_convert.stages.preview import converted_pipeline
from dcgen_convert.tiny import videos, world
from dcgen_convert.tiny.evaluator import seen
from dcgen_convert.tiny.motion import middle

SEED = 104_729  # prompts and noise that no training picture used
ROWS = 8  # prompts in the grid
MOVING = 4  # the same of videos: each column is a row of frames then
TITLES = {
    "reference": "the picture that is edited",
    "source": "the base model",
    "converted": "this model in 16 bits",
    "nvfp4": "this bundle (NVFP4)",
}
TITLES |= {"int4": "this bundle (INT4)", "round trip": "the base model's picture through the new autoencoder"}


def require(job: Job) -> None:
    """Refuse prompts that the judge of the tiny world cannot read, before any work is done.

    Raises:
        InputError: one of them, and which prompts it can.
    """
    asked, _ = _judge(job)
    for text in captions.others(job, job.recipe.evaluate.prompts, job.recipe.seed + SEED):
        asked(text)


def run(job: Job, stage: Stage, bundle: Path) -> PictureGrid:
    """Writes grid.png (base | converted | round trip of the base, the ceiling) and fills stage.metrics.

    Returns:
        The grid, for the model card.
    """
    count = job.recipe.evaluate.prompts
    texts = captions.others(job, count, job.recipe.seed + SEED)
    seeds = [job.recipe.seed + SEED + i for i in range(count)]
    settings, steps, guidance = job.recipe.data, job.recipe.bundle.steps, job.recipe.bundle.guidance
    own = own_side(job.identity, job.ae.grid, job.resolution)
    if own != job.resolution:
        job.console.say(f"verify: the base model draws at {own} px, as it was not trained on {job.resolution} px")
    with TemporaryDirectory(prefix=TEMPORARY, dir=stage.folder) as work:
        sizes = job.size, job.text_length, settings.batch
        same = job.size if own == job.resolution else (own, own)
        given = edited.of_prompts(edited.judging(job), count, job.recipe.seed + SEED, Path(work, edited.FOLDER))
        first = [own[0] for own in given]  # shown and compared with, whatever else the model is given
        frames = job.shown_frames
        sheet = Comparison(job.family, texts, seeds, *sizes, job.console, Path(work), given, frames, job.fps)
        source = partial(source_pipeline.load, job.source, job.dtype)
        drawn: dict[str, Column] = {}
        if given:
            drawn["reference"] = replace(sheet, size=same, frames=0).shown("reference", _read(first, same))
        with clock.renamed({"draw": "draw with the source"}):
            drawn |= {"source": replace(sheet, size=same).draw("source", source, settings.steps, settings.guidance)}
        if job.recipe.quantize.format != "none":
            with clock.renamed({"draw": "draw in 16 bits"}):
                drawn["converted"] = sheet.draw("converted", lambda: _twin(job), steps, guidance)
        name = "converted" if job.recipe.quantize.format == "none" else job.recipe.quantize.format
        runtime = runtime_of(bundle, job.dtype)
        with clock.renamed({"draw": "draw with the bundle"}):
            drawn[name] = sheet.draw(name, partial(of_bundle, bundle, job.dtype, runtime), steps, guidance)
        stage.metrics["runtime"] = runtime
        codec = precision.load(job, "target")
        with clock.timed("round trip", count):
            trips = (codec.decode(codec.encode(picture)) for picture in drawn["source"].pictures())
            drawn["round trip"] = replace(sheet, size=same).shown("round trip", trips)
        if "converted" in drawn and name != "converted":
            stage.metrics["psnr_quantised_db"] = round(distance(drawn[name], drawn["converted"]), 2)
        if job.recipe.evaluate.measures:
            others = replace(sheet, size=same, seeds=[(seed + OTHER) % 2**63 for seed in seeds])
            with clock.renamed({"draw": "draw with the source"}):
                floor = others.draw("floor", source, settings.steps, settings.guidance)
            columns = {CONVERTED: drawn[name], BASE: drawn["source"], FLOOR: floor, CEILING: drawn["round trip"]}
            files = {title: column.files for title, column in columns.items()}
            shapes = {CONVERTED: job.size, BASE: same}
            stage.metrics["evaluation"] = judged.evaluation(job, files, texts, seeds[0], shapes, first)
        if job.recipe.evaluate.metrics == "tiny-world":
            _judge(job)[1](job, stage, drawn, texts)
        return written(drawn, texts, stage.folder / "grid.png")


@dataclass(frozen=True)
class Column:
    """What was drawn by one pipeline: the pictures as files of 8 bits, and what is kept of them in memory.

    size: (height, width) in px. frames: of a video; 0: they are pictures. judged: (1, 3, s, s) of every picture, as the
    evaluator of the tiny world sees it; centres: the same of its middle, where the picture is larger than that. Of a
    video these are of its middle frame.
    """

    size: Size
    frames: int = 0
    files: list[Path] = field(default_factory=list)
    judged: list[Tensor] = field(default_factory=list)
    centres: list[Tensor] = field(default_factory=list)

    def pictures(self) -> Iterator[Tensor]:
        """The pictures one by one, (1, 3, height, width) in [-1, 1], or the videos, (1, 3, frames, height, width)."""
        return _read(self.files, (self.frames, *self.size) if self.frames else self.size)


def distance(one: Column, other: Column) -> float:
    """PSNR in dB over all pictures of two columns."""
    return psnr_of(zip(one.pictures(), other.pictures(), strict=True), peak=2.0)


def written(drawn: dict[str, Column], texts: list[str], file: Path) -> PictureGrid:
    """Write the first ROWS pictures of every column to ``file``; of videos `strips` of the first MOVING.

    It reads the files of the columns, so the folder that they were drawn in must be there.
    """
    moving = any(column.frames for column in drawn.values())
    asked = texts[: MOVING if moving else ROWS]
    films = {
        (BASE if name == "source" else name): [
            [*map(cell, frames_of(pixels[0]))] for pixels in islice(column.pictures(), len(asked))
        ]
        for name, column in drawn.items()
    }
    with replacing(file) as temporary:
        if moving:
            sheet = strips(films, asked)
        else:
            sheet = grid({title: [picture for (picture,) in column] for title, column in films.items()}, asked)
        sheet.save(temporary, format="PNG")
    return PictureGrid(file, [TITLES.get(title, title) for title in drawn], asked)


def of_bundle(bundle: Path, dtype: torch.dtype, runtime: str) -> Any:
    """The pipeline of a bundle."""
    return loading.load(bundle, dtype, runtime)[0]


def runtime_of(bundle: Path, dtype: torch.dtype) -> str:
    """How a bundle is judged: as its kernels compute, or as an emulation of them does."""
    runtime = loading.choose_runtime(bundle, "auto", dtype)
    return "emulated" if runtime == "dequantised" else runtime  # else the activations' 4 bits would be left out


def _judge(job: Job) -> tuple[Callable[[str], object], Callable[[Job, Stage, dict[str, Column], list[str]], None]]:
    """What reads a prompt of the tiny world, and what judges the pictures or videos drawn from such prompts."""
    if job.frames:
        return tiny_videos.asked, figures_of_videos
    if edited.tried(edited.judging(job)):
        return tiny_edits.asked, figures_of_edits
    return tiny_world.asked, figures


def figures(job: Job, stage: Stage, drawn: dict[str, Column], texts: list[str]) -> None:
    """Attribute accuracy and Frechet distance of every column; of large pictures that of their parts too."""
    for name, column in drawn.items():
        pictures = torch.cat(column.judged)
        key = name.replace(" ", "_")
        stage.metrics[f"accuracy_{key}"] = round(tiny_world.accuracy(pictures, texts), 4)
        stage.metrics[f"frechet_{key}"] = round(tiny_world.distance(pictures, texts), 2)
        if column.centres:
            apart = tiny_world.distance_of_crops(torch.cat(column.centres), texts, side=column.size[0])
            stage.metrics[f"crops_frechet_{key}"] = round(apart, 2)
    shown = ", ".join(f"{name} {stage.metrics['accuracy_' + name.replace(' ', '_')]:.1%}" for name in drawn)
    job.console.say(f"evaluate: attribute accuracy {shown} on {len(texts)} prompts")


def figures_of_videos(job: Job, stage: Stage, drawn: dict[str, Column], texts: list[str]) -> None:
    """Of every column which share of the seven attributes is right, and of the motions alone; the Frechet distance of
    the middle frames to pictures."""
    pictures_of = [videos.picture_of(text) for text in texts]
    for name, column in drawn.items():
        key, found, middles = name.replace(" ", "_"), [], []
        if not column.frames:  # the picture that the model is given
            continue
        for clip, text in zip(column.pictures(), texts, strict=True):
            found.append(tiny_videos.found(clip, [text]))
            middles.append(seen(middle(clip)))
        right = torch.cat(found).double()
        stage.metrics[f"accuracy_{key}"] = round(right.mean().item(), 4)
        stage.metrics[f"motion_{key}"] = round(right[:, -1].mean().item(), 4)
        stage.metrics[f"frechet_{key}"] = round(tiny_world.distance(torch.cat(middles), pictures_of), 2)
        job.console.say(
            f"evaluate: {name}: {right.mean():.1%} of the attributes of {len(texts)} prompts are right, "
            f"{right[:, -1].mean():.1%} of the motions"
        )


def figures_of_edits(job: Job, stage: Stage, drawn: dict[str, Column], texts: list[str]) -> None:
    """Of every column how often the asked-for attribute is right, and which share of the others stayed."""
    references = torch.cat(drawn["reference"].judged)
    for name, column in drawn.items():
        if name == "reference":
            continue
        pictures, key = torch.cat(column.judged), name.replace(" ", "_")
        right, kept = tiny_edits.changed(pictures, texts), tiny_edits.kept(pictures, references, texts)
        stage.metrics[f"edit_accuracy_{key}"] = round(right.mean().item(), 4)
        stage.metrics[f"preservation_{key}"] = round(kept.nanmean().item(), 4)
        job.console.say(
            f"evaluate: {name}: {right.mean():.1%} of {len(texts)} edits show what was asked for, "
            f"{kept.nanmean():.1%} of the other attributes stay"
        )


def _read(files: list[Path], size: contents.Size) -> Iterator[Tensor]:
    """The pictures or videos in ``files`` one by one, (1, 3, *size) in [-1, 1]."""
    return (contents.read(file, [size])[0][None] for file in files)


def _twin(job: Job) -> Any:
    """The pipeline of the converted model in 16 bits."""
    return converted_pipeline(job, models.load(job.folders.converted, job.dtype, device=pipelines.device()))


@dataclass(frozen=True)
class Comparison:
    """The pictures that several pipelines draw: prompts with their seeds, size (height, width) in px, text tokens,
    pictures at once.

    references: of an editing model, the files of the pictures that each prompt edits. frames: of a video that is drawn;
    0: pictures are. fps: frames a second of a video.
    A picture is written to the folder ``work`` as soon as it is drawn, so that memory holds few of them.
    """

    family: Family
    texts: list[str]
    seeds: list[int]
    size: Size
    length: int
    batch: int
    console: Console
    work: Path
    references: Sequence[Sequence[Path]] = ()
    frames: int = 0
    fps: float = 0

    def draw(self, name: str, load: Callable[[], Any], steps: int, guidance: float) -> Column:
        """The pictures of one pipeline. What ``load`` returns is freed before the next one is loaded."""
        drawn = self.shown(name, self._drawn(load(), steps, guidance))
        release()
        return drawn

    def shown(self, name: str, parts: Iterable[Tensor]) -> Column:
        """A column of pictures that come in parts, (B, 3, H, W) in [-1, 1], or of videos (B, 3, F, H, W)."""
        column = Column(self.size, self.frames)
        for pixels in chain.from_iterable(parts):
            still = shown(self.family, pixels) if self.frames else pixels
            file = self.work / f"{name.replace(' ', '-')}-{len(column.files)}{contents.suffix(self.frames > 0)}"
            contents.write(pixels, file, self.fps)
            column.files.append(file)
            column.judged.append(seen(still[None]))
            if min(self.size) >= 2 * world.SIDE:
                column.centres.append(tiny_world.centre(still[None]).clone())
        return column

    def _drawn(self, pipeline: Any, steps: int, guidance: float) -> Iterator[Tensor]:
        def part(places: range) -> Tensor:
            given = [self.references[place] for place in places] if self.references else ()
            return pipelines.draw(
                self.family,
                pipeline,
                [self.texts[place] for place in places],
                [self.seeds[place] for place in places],
                side=self.size[0],
                width=self.size[1],
                steps=steps,
                guidance=guidance,
                length=self.length,
                references=[[images.read_pixels(file, *self.size) for file in own] for own in given],
                frames=max(1, self.frames),
            )

        drawing = AtOnce("verify: drawing", self.console.warn)
        most = pixel_memory.together(self.batch, max(1, self.frames) * self.size[0] * self.size[1], pixel_memory.DRAWN)
        return drawing.parts(range(len(self.texts)), part, most)
