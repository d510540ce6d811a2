"""Stage `data`: captioned pictures, or videos for a family that draws them.

The base model draws them from prompts, as in the paper, or the user gives them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from dcgen_convert.core import clock
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import hashes
from dcgen_convert.core.journal import MARKER, Stage
from dcgen_convert.core.progress import Bar
from dcgen_convert.data import contents, images, prompts, videos
from dcgen_convert.data.images import NOUNS, Picture
from dcgen_convert.families import pixel_memory
from dcgen_convert.networks import models, pipelines, text_lengths
from dcgen_convert.networks.at_once import AtOnce
from dcgen_convert.stages import captions, edited, source_pipeline
from dcgen_convert.stages.job import Job

if TYPE_CHECKING:
    from torch import Tensor


def require_all(job: Job) -> None:
    """`require` for every set of pictures that is not made yet. What the base draws beyond its training is told once.

    Raises:
        InputError: as `require`.
    """
    views = [job.of_set(number) for number in job.recipe.sets]
    views = [view for view in views if not (view.folders.data / MARKER).exists()]
    for told in dict.fromkeys(view.beyond.told for view in views if view.beyond):
        job.console.warn(told)
    for view in views:
        require(view)


def require(job: Job) -> None:
    """Look at the data before any work is done: the folder, the captions, the heads of the pictures, the prompts.

    Raises:
        InputError: one of them cannot be used, or there are too few pictures.
    """
    settings = job.recipe.data
    count = settings.count
    if settings.kind == "folder":
        pictures, _ = job.taken
        job.sieve.require(len(pictures))
        broken: list[str] = []
        edited.require(job, pictures)
        for picture in pictures:
            try:
                for file in job.files_of(picture).values():
                    contents.require(file, bool(job.frames), job.fps)
            except InputError as error:
                broken.append(error.message)
        require_few(job, broken, len(pictures))
        count = len(pictures) - len(broken)
        require_classes(job, (picture.caption for picture in pictures))
        require_two(count)
        return
    if job.frames:
        videos.require_reader()  # not after hours of drawing
    if settings.prompts not in prompts.KINDS:
        edited.require_instructions(job)
        require_classes(job, captions.prompt_list(job).texts)
    elif edited.drawn(job):
        edited.require_instructions(job)
    elif captions.class_names(job.source) is None and (doubt := prompts.doubt(settings.prompts, count)):
        job.console.warn(doubt)
    require_two(count)


def require_few(job: Job, broken: list[str], count: int) -> None:
    """InputError when more of ``count`` pictures are ``broken`` (a sentence each) than `data.max_broken` allows."""
    limit = math.floor(job.recipe.data.max_broken * count)
    if len(broken) > limit:
        noun = NOUNS[job.family.axes]
        raise InputError(
            f"{len(broken)} of {count} {noun} cannot be read, {limit} are tolerated; first: {broken[0]}",
            "repair them, or raise data.max_broken",
        )


def require_classes(job: Job, texts: Iterable[str]) -> None:
    """InputError for a caption that a class-conditional source does not know; any caption is right for the others."""
    if job.source.family.text_keys != ("class_labels",):
        return
    table: dict[str, str] = job.source.index.get("id2label") or {}
    known = {label.strip() for labels in table.values() for label in labels.split(",")}
    count = job.source.config.get("num_embeds_ada_norm", len(table))
    for caption in texts:
        if caption and caption not in known and not (caption.isdecimal() and int(caption) <= count):
            raise InputError(
                f"the caption {caption[:60]!r} is no class of {job.source.root.name}",
                "captions of a class-conditional model are numbers or labels of its model_index.json",
            )


def require_two(count: int) -> None:
    """InputError for a single picture: one is held out, so that nothing would be left to train on."""
    if count < 2:
        raise InputError("a conversion needs at least 2 pictures: one of them is held out", "give more pictures")


def run(job: Job, stage: Stage) -> None:
    """Writes index.jsonl, and pictures/ when they are drawn."""
    name = stage.folder.name
    if job.recipe.data.kind == "folder":
        with clock.timed("hash", job.recipe.data.count):
            pictures = job.given
        job.console.say(f"{name}: {job.taken[1]}")
        stage.metrics["min_side"] = job.min_side
    else:
        if job.recipe.data.prompts not in prompts.KINDS and (
            note := captions.prompt_list(job).told(job.recipe.data.prompts, job.recipe.data.count)
        ):
            job.console.say(f"{name}: {note}")
        pictures = synthesise(job)
    images.write_index(stage.folder / images.INDEX, pictures, job.pictures_root)
    stage.metrics.update(pictures=len(pictures), captions=len({picture.caption for picture in pictures}))
    if counts := Counter(len(given) for picture in pictures if (given := job.references_of(picture))):
        stage.metrics |= {"references": max(counts), "with_references": counts.total()}
        job.console.say(f"{name}: {counts.total()} of {len(pictures)} pictures have references, at most {max(counts)}")
    job.console.say(f"{name}: {len(pictures)} {NOUNS[job.family.axes]}, {stage.metrics['captions']} distinct captions")
    tell_captions(job, [picture.caption for picture in pictures])


def tell_captions(job: Job, texts: list[str]) -> None:
    """Say how many captions are empty, and how many are longer than the text encoders read."""
    if empty := sum(not text for text in texts):
        job.console.warn(f"{empty} of {len(texts)} captions are empty")
    if longer := text_lengths.cut(job.source, texts, job.text_length):
        job.console.warn(
            f"{len(longer)} of {len(texts)} captions are longer than {job.text_length} tokens and are cut, first "
            f"{texts[longer[0]][:60]!r}; latents.text_length sets the length"
        )


def listed(job: Job) -> list[Picture]:
    """The pictures of the finished stage."""
    return images.read_index(job.folders.data / images.INDEX, job.pictures_root)


def synthesise(job: Job) -> list[Picture]:
    """Draw the pictures that are not there yet.

    Each picture is written whole or not at all, so a run that was cut off continues with the next one.
    """
    pictures = intended(job)
    pictures[0].file.parent.mkdir(exist_ok=True)
    captions.keep(job)
    for picture in pictures:
        if picture.file.exists() and not contents.is_whole(picture.file):
            job.console.warn(f"{picture.file} is damaged: it is drawn again")
            picture.file.unlink()
    missing = sum(not picture.file.exists() for picture in pictures)
    if missing:
        with job.console.progress("synthesis by the base model", len(pictures), NOUNS[job.family.axes]) as bar:
            bar.advance(len(pictures) - missing)
            with job.crew.share("pictures", bar, together=False, of=job.pictures):
                draw_part(job, bar)
    files = [picture.file for picture in pictures]
    return [replace(picture, sha256=digest) for picture, digest in zip(pictures, hashes(files), strict=True)]


def intended(job: Job) -> list[Picture]:
    """Every picture of the recipe with its caption and seed, drawn or not."""
    texts = captions.texts_of(job, job.recipe.data.count)
    folder = job.folders.data / "pictures"
    first = job.recipe.seed * 1_000_003 % 2**63
    suffix = contents.suffix(bool(job.frames))
    drawn = [Picture(folder / f"{i:07d}{suffix}", text, first + i) for i, text in enumerate(texts)]
    files = edited.of_prompts(job, len(texts), job.recipe.seed, job.folders.data / edited.FOLDER)
    return [replace(one, references=own) for one, own in zip(drawn, files, strict=True)] if files else drawn


def draw_part(job: Job, bar: Bar) -> None:
    """Draw what is missing among this rank's pictures. Each rank has every `world`-th picture.

    A batch has up to data.batch pictures, and as many as `pixel_memory.DRAWN` px are. One in which a picture is missing
    is drawn as a whole: in another batch a picture would be rounded otherwise. So with the same data.batch a run that
    was cut off draws the very same pictures. Where memory is short, a batch is halved.
    """
    settings = job.recipe.data
    frames, (height, width) = job.drawn_frames, job.drawn_size
    batch = pixel_memory.together(settings.batch, frames * height * width, pixel_memory.DRAWN)
    own = intended(job)[job.crew.rank :: job.crew.world]
    batches = [own[start : start + batch] for start in range(0, len(own), batch)]
    batches = [part for part in batches if not all(picture.file.exists() for picture in part)]
    if not batches:
        return
    pipeline = source_pipeline.load(job.source, job.dtype)
    source_pipeline.cap_shift(pipeline, job.identity, settings.resolution)
    if job.recipe.compile:
        for network in pipelines.networks_of(job.family, pipeline):
            models.compile_blocks(job.family, network)
    drawing = AtOnce(f"{job.folders.data.name}: drawing", job.console.warn)

    def draw(part: list[Picture]) -> Tensor:
        pixels = pipelines.draw(
            job.family,
            pipeline,
            [picture.caption for picture in part],
            [cast(int, picture.seed) for picture in part],  # what is drawn has a seed
            side=height,
            width=width,
            steps=settings.steps,
            guidance=settings.guidance,
            length=job.text_length,
            references=images.read_references([one.references for one in part if one.references], height, width),
            frames=frames,
        )
        return pixels[:, :, : job.frames] if job.frames else pixels

    for together in batches:
        drawn = [pixels for part in drawing.parts(together, draw) for pixels in part]
        pairs = zip(together, drawn, strict=True)
        missing = [(picture, pixels) for picture, pixels in pairs if not picture.file.exists()]
        for picture, pixels in missing:
            with clock.timed("write"):
                contents.write(pixels, picture.file, job.fps)
        bar.advance(len(missing))
