"""Which prompt each picture of a run is drawn from, and that it stays so when prompts are added.

prompts.json  beside the pictures: the prompts of the user's list that the pictures were given, in their order. It is
              written before the first is drawn, and it only grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint.source import Source
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object, write_json
from dcgen_convert.core.journal import fingerprint
from dcgen_convert.data import earlier_prompts, prompt_lists, prompts
from dcgen_convert.families import Family
from dcgen_convert.stages import edited
from dcgen_convert.stages.folders import data_stage
from dcgen_convert.stages.job import Job

FILE = "prompts.json"
CAPTIONS = "the captions"  # name of their fingerprint among the inputs of the stage


def texts_of(job: Job, count: int) -> list[str]:
    """Captions of the first ``count`` pictures that the recipe asks for."""
    kind, seed = job.recipe.data.prompts, job.recipe.seed
    if kind in prompts.KINDS and (classes := class_names(job.source)):
        return prompts.generated(kind, count, seed, classes)
    begun = job.remembered(FILE, _begun)
    if begun == EARLIER:
        return _earlier(job, count)
    if kind in prompts.KINDS:
        return prompts.generated(kind, count, seed)
    return prompts.of_list(prompt_list(job).texts, count, seed, begun)


def others(job: Job, count: int, seed: int) -> list[str]:
    """``count`` prompts of the same kind, drawn with another seed; of a user's edited pictures, their own."""
    job = edited.judging(job)
    if edited.tried(job) and edited.by_given(job):
        return [picture.caption for picture in edited.shown(job, count)]
    kind, classes = job.recipe.data.prompts, class_names(job.source)
    if kind in prompts.KINDS:
        return prompts.generated(kind, count, seed, classes)
    return prompts.of_list(prompt_list(job).texts, count, seed)


def prompt_list(job: Job) -> prompt_lists.PromptList:
    """The user's list of prompts; read once."""
    return job.remembered("prompts", lambda job: prompt_lists.read(job.recipe.data.prompts, job.identity.offline))


def keep(job: Job) -> None:
    """Write down which prompts of a list the pictures get."""
    begun = job.remembered(FILE, _begun)
    if job.recipe.data.prompts in prompts.KINDS or begun == EARLIER:
        return
    texts = texts_of(job, max(job.recipe.data.count, len(begun)))
    document = {"seed": job.recipe.seed, "captions": texts}
    write_json(job.folders.data / FILE, {**document, "sha256": fingerprint(document)})


EARLIER = ("as before",)  # the run began before prompts were shuffled, and with the built-in prompts of then


def _begun(job: Job) -> tuple[str, ...]:
    """Prompts of the pictures that this run has begun to draw from a list; EARLIER; empty for a new run.

    It is read once: where the stage starts again, its folder goes, and the pictures get the same prompts.
    """
    path = job.folders.data / FILE
    if not path.exists():
        before = job.run.inputs(data_stage(job.pictures))
        count = int(before.get("data.count") or 0)
        return EARLIER if count and fingerprint(_earlier(job, count)) == before.get(CAPTIONS) else ()
    try:
        document = read_object(path)
    except InputError:
        return ()  # damaged; the fingerprint of the captions tells whether the pictures hold
    seal = document.pop("sha256", None)
    intact = seal == fingerprint(document) and document.get("seed") == job.recipe.seed
    return tuple(document["captions"]) if intact else ()


def _earlier(job: Job, count: int) -> list[str]:
    """The prompts that version 0.2.0 gave before lists were shuffled; empty for what it did not know."""
    kind = job.recipe.data.prompts
    if kind == "builtin":
        return earlier_prompts.builtin(count, job.recipe.seed)
    path, column = prompt_lists.place_of(kind)
    is_text = column is None and path.is_file() and path.suffix.lower() == prompt_lists.TEXT
    return earlier_prompts.of_file(path, count) if is_text else []


def class_names(source: Source) -> list[str] | None:
    """Labels of a class-conditional source; None for a text-conditional one."""
    return labels(source.family, source.index, source.root)


def labels(family: Family, index: Mapping[str, Any], root: Path) -> list[str] | None:
    """`class_names` of the pipeline in ``root`` with this model_index.json."""
    if family.text_keys != ("class_labels",):
        return None
    table = index.get("id2label")
    if not table:
        raise InputError(
            f"{root}/model_index.json has no id2label, so no class can be drawn",
            "add the table, or use data.kind folder",
        )
    return sorted({label.split(",")[0].strip() for label in table.values()})
