"""Stage `data`: captioned pictures. The base model draws them from prompts, as in the paper, or the user gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from dcgen_convert.checkpoint.source import Source
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json, replacing, sha256
from dcgen_convert.core.journal import MARKER, Stage
from dcgen_convert.core.progress import Bar
from dcgen_convert.data import images, prompts
from dcgen_convert.data.images import Picture
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe.schema import result_settings
from dcgen_convert.stages.job import Job


def inputs(job: Job) -> dict[str, Any]:
    """What the stage depends on besides the source: the settings, and the contents of the files that they name.

    Files that are no longer there count as unchanged: a run that has its latents continues without them.
    """
    settings, drawn = job.recipe.data, result_settings(job.recipe)["data"]
    del drawn["buckets"]  # pictures do not depend on how they are cut
    found: dict[str, Any] = {"data": drawn, "text_length": job.text_length}
    if settings.path and settings.kind == "folder":
        files = images.listing(Path(settings.path))
    elif settings.prompts not in prompts.KINDS:
        files = sha256(Path(settings.prompts)) if Path(settings.prompts).is_file() else None
    else:
        return found
    marker = job.folders.data / MARKER
    before = read_json(marker)["inputs"].get("files") if marker.exists() else None
    return {**found, "files": files or before}


def run(job: Job, stage: Stage) -> None:
    """Writes index.jsonl, and pictures/ when they are drawn."""
    settings = job.recipe.data
    if settings.path and settings.kind == "folder":
        pictures = images.read_folder(Path(settings.path))[: settings.count]
    else:
        if note := prompts.told(settings.prompts, settings.count):
            job.console.say(f"data: {note}")
        pictures = synthesise(job)
    images.write_index(stage.folder, pictures)
    stage.metrics.update(pictures=len(pictures), captions=len({picture.caption for picture in pictures}))
    job.console.say(f"data: {len(pictures)} pictures, {stage.metrics['captions']} distinct captions")


def synthesise(job: Job) -> list[Picture]:
    """Draw the pictures that are not there yet.

    Each picture is written whole or not at all, so a run that was cut off continues with the next one.
    """
    pictures = intended(job)
    pictures[0].file.parent.mkdir(exist_ok=True)
    missing = sum(not picture.file.exists() for picture in pictures)
    if missing:
        with job.console.progress("synthesis by the base model", len(pictures), "pictures") as bar:
            bar.advance(len(pictures) - missing)
            with job.crew.share("pictures", bar, together=False):
                draw_part(job, bar)
    return pictures


def intended(job: Job) -> list[Picture]:
    """Every picture of the recipe with its caption and seed, drawn or not."""
    settings = job.recipe.data
    texts = prompts.make(settings.prompts, settings.count, job.recipe.seed, class_names(job.source))
    folder = job.folders.data / "pictures"
    return [Picture(folder / f"{i:07d}.png", text, job.recipe.seed * 1_000_003 + i) for i, text in enumerate(texts)]


def draw_part(job: Job, bar: Bar) -> None:
    """Draw what is missing among this rank's pictures. Each rank has every `world`-th picture.

    A batch in which one picture is missing is drawn as a whole: in another batch a picture would be rounded otherwise.
    """
    settings = job.recipe.data
    own = intended(job)[job.crew.rank :: job.crew.world]
    batches = [own[start : start + settings.batch] for start in range(0, len(own), settings.batch)]
    batches = [batch for batch in batches if not all(picture.file.exists() for picture in batch)]
    if not batches:
        return
    pipeline = pipelines.load_pipeline(job.source, job.dtype)
    for batch in batches:
        drawn = pipelines.draw(
            job.family,
            pipeline,
            [picture.caption for picture in batch],
            [cast(int, picture.seed) for picture in batch],  # what is drawn has a seed
            side=settings.resolution,
            steps=settings.steps,
            guidance=settings.guidance,
            length=job.text_length,
        )
        missing = [(picture, pixels) for picture, pixels in zip(batch, drawn, strict=True) if not picture.file.exists()]
        for picture, pixels in missing:
            with replacing(picture.file) as temporary:
                images.to_image(pixels).save(temporary, format="PNG", compress_level=1)
        bar.advance(len(missing))


def class_names(source: Source) -> list[str] | None:
    """Labels of a class-conditional source; None for a text-conditional one."""
    if source.family.text_keys != ("class_labels",):
        return None
    table = source.index.get("id2label")
    if not table:
        raise InputError(
            f"{source.root}/model_index.json has no id2label, so no class can be drawn",
            "add the table, or use data.kind folder",
        )
    return sorted({label.split(",")[0].strip() for label in table.values()})
