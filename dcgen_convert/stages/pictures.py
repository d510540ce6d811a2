"""Stage `data`: captioned pictures, drawn by the base model from prompts (the paper's way) or taken from the user's
folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint.source import Source
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json, replacing, sha256
from dcgen_convert.core.journal import MARKER, Stage
from dcgen_convert.data import images, prompts
from dcgen_convert.data.images import Picture
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe.schema import result_settings


def inputs(job) -> dict[str, Any]:
    """What the stage depends on besides the source: the settings, and the contents of the files that they name.

    Files that are no longer there count as unchanged: a run that has its latents goes on without them.
    """
    settings, drawn = job.recipe.data, result_settings(job.recipe)["data"]
    del drawn["buckets"]  # pictures do not depend on how they are cut
    found: dict[str, Any] = {"data": drawn, "text_length": job.text_length}
    if settings.kind == "folder":
        files = images.listing(Path(settings.path))
    elif settings.prompts not in prompts.KINDS:
        files = sha256(Path(settings.prompts)) if Path(settings.prompts).is_file() else None
    else:
        return found
    marker = job.folder("data") / MARKER
    before = read_json(marker)["inputs"].get("files") if marker.exists() else None
    return {**found, "files": files or before}


def run(job, stage: Stage) -> None:
    """Writes index.jsonl, and pictures/ when they are drawn."""
    if job.recipe.data.kind == "folder":
        pictures = images.read_folder(job.recipe.data.path)[: job.recipe.data.count]
    else:
        pictures = synthesise(job, stage)
    images.write_index(stage.folder, pictures)
    stage.metrics.update(pictures=len(pictures), captions=len({picture.caption for picture in pictures}))
    job.console.say(f"data: {len(pictures)} pictures, {stage.metrics['captions']} distinct captions")


def synthesise(job, stage: Stage) -> list[Picture]:
    """Draw the pictures that are not there yet; each is written whole, so a run that was cut off goes on with the
    next.
    """
    pictures = intended(job)
    pictures[0].file.parent.mkdir(exist_ok=True)
    missing = sum(not picture.file.exists() for picture in pictures)
    if missing:
        with job.console.progress("synthesis by the base model", len(pictures), "pictures") as bar:
            bar.advance(len(pictures) - missing)
            with job.crew.share("pictures", bar, together=False):
                draw_share(job, bar)
    return pictures


def intended(job) -> list[Picture]:
    """Every picture of the recipe with its caption and seed, drawn or not."""
    settings = job.recipe.data
    texts = prompts.make(settings.prompts, settings.count, job.recipe.seed, class_names(job.source))
    folder = job.folder("data") / "pictures"
    return [Picture(folder / f"{i:07d}.png", text, job.recipe.seed * 1_000_003 + i) for i, text in enumerate(texts)]


def draw_share(job, bar) -> None:
    """Draw what is missing among this rank's pictures: every `world`-th.

    A batch in which one is missing is drawn as a whole: with others beside it, a picture would round differently.
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
            [picture.seed for picture in batch],
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
    """Labels of a class-conditional source, None for text-conditional ones."""
    if source.family.text_keys != ("class_labels",):
        return None
    table = source.index.get("id2label")
    if not table:
        raise InputError(
            f"{source.root}/model_index.json has no id2label, so no class can be drawn",
            "add the table, or use data.kind folder",
        )
    return sorted({label.split(",")[0].strip() for label in table.values()})
