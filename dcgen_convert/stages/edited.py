"""What an editing model is given beside the instruction: a reference, the picture that it edits.

Pictures of the user's own come with theirs. What the base draws is made from the pictures in `data.sources`, or from
drawn ones of the tiny world. What is drawn to judge or to calibrate a model is made from references of the same kind.
"""

from __future__ import annotations

import hashlib
import os
from itertools import cycle, islice
from pathlib import Path

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import hashes
from dcgen_convert.data import drawn_edits, edit_prompts, images, prompts, videos
from dcgen_convert.data.drawn import holds_edits
from dcgen_convert.data.images import Picture
from dcgen_convert.recipe.drawable import draws_edits
from dcgen_convert.stages.job import Job

FOLDER = "references"
ROW = '{"file": "edited/1.png", "source": "original/1.png", "caption": "make the sky red"}'


def drawn(job: Job) -> bool:
    """Whether what the base draws for these pictures are edits."""
    return draws_edits(job.recipe.data, job.family)


def tried(job: Job) -> bool:
    """Whether the model is tried with edits: where all rows of these pictures have references."""
    if job.recipe.data.kind != "folder" or not job.family.references:
        return drawn(job)
    if job.family.fewest_references:
        return True
    index = job.folders.data / images.INDEX  # the user's own may be gone by now
    found = images.read_index(index, job.pictures_root) if index.exists() else job.taken[0]
    return all(picture.references for picture in found)


def of_prompts(job: Job, count: int, seed: int, folder: Path) -> list[tuple[Path, ...]]:
    """Files of the references for each of the prompts that `captions` gives; none for a model that reads none.

    Args:
        seed: of the prompts.
        folder: where references are drawn, if they are.
    """
    data = job.recipe.data
    if not tried(job):
        return []
    if by_given(job):
        return _firsts(shown(job, count), folder) if job.frames else [one.references for one in shown(job, count)]
    own = data.prompts == drawn_edits.WORD
    files = drawn_edits.draw(folder, count, seed, data.resolution) if own else islice(cycle(sources(job)), count)
    return [(file,) for file in files]


def _firsts(pictures: list[Picture], folder: Path) -> list[tuple[Path, ...]]:
    """The first frames of videos, written as pictures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{place}.png" for place in range(len(pictures))]
    for picture, file in zip(pictures, files, strict=True):
        width, height, _ = videos.shape(picture.file, most=1)
        images.write(videos.read(picture.file, 1, height, width)[:, 0], file)
    return [(file,) for file in files]


def by_given(job: Job) -> bool:
    """Whether a model that edits is tried with the user's own pictures. Of drawn edits, new ones are drawn."""
    data = job.recipe.data
    return data.kind == "folder" and not (data.prompts == drawn_edits.WORD and all(map(holds_edits, data.paths)))


def sources(job: Job) -> list[Path]:
    """The pictures of `data.sources`, in the order of their names.

    Raises:
        InputError: there is no such folder, or it holds no pictures.
    """
    if job.recipe.data.sources is None:
        raise InputError(
            f"{job.recipe.source} edits pictures, and the recipe names none to edit",
            "--set data.sources=FOLDER with --prompts FILE of instructions; or --data FILE.jsonl with edited pictures",
        )
    return edit_prompts.pictures_of(job.recipe.data.sources, "data.sources")


def shown(job: Job, count: int) -> list[Picture]:
    """``count`` of the user's pictures whose instructions are tried: those that are held out, then others."""

    def place(picture: Picture) -> bytes:  # as `cache.hold_out` chooses
        name = os.path.relpath(picture.file, job.pictures_root)
        return hashlib.sha256(name.encode(errors="surrogateescape")).digest()

    return list(islice(cycle(sorted(job.taken[0], key=place)), count))


def require(job: Job, pictures: list[Picture]) -> None:
    """InputError for a picture of the user's own that was made from more pictures, or fewer, than the model reads."""
    fewest, most = job.family.fewest_references, job.family.references
    bare = [picture for picture in pictures if len(job.references_of(picture)) < fewest]
    full = [picture for picture in pictures if most and len(job.references_of(picture)) > most]
    if bare:
        raise InputError(
            f"{len(bare)} of {len(pictures)} pictures do not say what they were made from, first {bare[0].file}",
            f"an editing model learns from rows like {ROW}",
        )
    if full:
        raise InputError(
            f"{len(full)} of {len(pictures)} pictures were made from more than the {most} that a {job.family.name} "
            f"model reads, first {full[0].file} from {len(full[0].references)}",
            f"leave them out, or shorten {images.SOURCE!r} in their rows",
        )


def require_instructions(job: Job) -> None:
    """InputError when the base is to draw edits from prompts that are captions, or from pictures that are not there."""
    data = job.recipe.data
    if not drawn(job) or data.prompts == drawn_edits.WORD:
        return
    if data.prompts in prompts.CAPTIONS:
        raise InputError(
            f"data.prompts {data.prompts} gives captions, and {job.recipe.source} edits pictures by instructions",
            "--prompts FILE with one instruction per line, and --set data.sources=FOLDER with pictures to edit",
        )
    sources(job)


def contents(job: Job) -> list[str] | None:
    """SHA-256 of every picture of `data.sources`, in their order; None where they are gone. Read once."""
    if job.recipe.data.sources is None or job.recipe.data.prompts == drawn_edits.WORD:
        return []
    if not Path(job.recipe.data.sources).expanduser().is_dir():
        return None
    return job.remembered(f"sources {job.pictures}", lambda job: [*hashes(sources(job))])


def judging(job: Job) -> Job:
    """The job with the pictures whose kind of instruction the model is tried with: those of the last phase."""
    last = job.of_phase(len(job.recipe.adapt.phases)) if job.family.references else job
    return last if job.family.fewest_references or tried(last) else job
