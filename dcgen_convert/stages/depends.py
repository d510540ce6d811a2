"""What the result of every stage depends on, and which changes a stage can go on with.

When one of the values that a stage depends on changes, the stage runs again. Settings that no stage names, like those
of schema.LAYOUT, change no result. The results of earlier stages count too: conversion.py says which.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dcgen_convert.core import names
from dcgen_convert.core.errors import AccessError
from dcgen_convert.core.files import read_object, sha256
from dcgen_convert.core.journal import MARKER, differing, fingerprint
from dcgen_convert.data import given, hub, images, prompt_lists, prompts
from dcgen_convert.data.images import Picture
from dcgen_convert.families import EXPERT_NAMES
from dcgen_convert.recipe.schema import LAYOUT, result_settings
from dcgen_convert.stages import captions, edited, folders
from dcgen_convert.stages.captions import CAPTIONS, texts_of
from dcgen_convert.stages.job import Job

IMPORT, ADAPT, MERGE = "import", "adapt", "merge"
SOURCE, AUTOENCODER, RESOLUTION = "the source", "the autoencoder", "the resolution of the last phase"
BASE_VIEW = "the pictures that the base sees"  # in the first phase, and at which size: align_embedder.target
NETWORK = "the source's network"  # its files, and those of no component; SOURCE: all files
PICTURES = "the contents of data.path"
SOURCES = "the pictures that are edited"
PHASE = "adapt.phases.*"  # without its data: they are the inputs of stages of their own
START, OPTIMIZER = "adapt.lora_start", "adapt.optimizer"
TIMES = "the noise levels of the network"  # of models that have several networks
FRAMES = "data.frames"
BEYOND = "the shift beyond the base's size"
SHAPE = "the shape of what the base draws"
TRAINING = (
    "seed", "dtype", "adapt.objective", "adapt.null_branch", "adapt.guidance_range", "adapt.data_guidance",
    "adapt.shift", "adapt.weighting", "adapt.text_drop", "adapt.ema", TIMES,
)  # fmt: skip

# Stage -> settings (the name of a section stands for all of its settings, * for the stage's phase) and facts. A higher
# number in VERSIONS tells that the stage's code gives another result than before.
DEPENDS: dict[str, tuple[str, ...]] = {
    IMPORT: (SOURCE,),
    folders.SURGERY: (NETWORK, AUTOENCODER, RESOLUTION),
    folders.DATA: (
        SOURCE, PICTURES, CAPTIONS, SOURCES, "seed", "dtype", "data.kind", "data.count", "data.steps", "data.guidance",
        "data.resolution", SHAPE, FRAMES, BEYOND, "latents.text_length",
    ),
    folders.LATENTS: (
        SOURCE, AUTOENCODER, "dtype", "data.buckets", FRAMES, "latents", "adapt.phases.resolution", BASE_VIEW,
    ),
    folders.ALIGN_EMBEDDER: (NETWORK, "seed", "align_embedder"),
    folders.ALIGN_HEAD: ("align_head", *TRAINING),
    ADAPT: (PHASE, START, OPTIMIZER, "adapt.clip", *TRAINING),
    MERGE: ("merge_lora",),
    folders.QUANTIZE: (
        "seed", "dtype", "data.prompts", "latents.text_length", "bundle.steps", "bundle.guidance", "quantize",
    ),
    folders.BUNDLE: ("name", "bundle", "merge_lora", "latents.scale_override"),
    folders.VERIFY: (),
}  # fmt: skip
VERSIONS = {**dict.fromkeys(DEPENDS, 1), folders.ALIGN_HEAD: 2}
DRAWN = (
    SOURCE, CAPTIONS, SOURCES, "seed", "dtype", "data.steps", "data.guidance", "data.resolution", SHAPE, BEYOND,
    "latents.text_length",
)  # fmt: skip
GROWS = ("data.count", PICTURES, CAPTIONS)  # pictures are kept one by one


# Facts -> the settings behind them. A folder or file that only moved is the same.
FACTS = {
    SOURCE: ("source", "base", "loras", "revision"),
    NETWORK: ("source", "base", "loras", "revision"),
    AUTOENCODER: ("ae", "ae_channels"),
    RESOLUTION: ("adapt.phases.*.resolution",),
    PICTURES: ("data.min_side",),
    SOURCES: ("data.sources",),
    BEYOND: ("data.beyond_base",),
    SHAPE: ("data.buckets",),
    CAPTIONS: ("seed", "data.count", "data.prompts"),
    "adapt.phases.resolution": ("adapt.phases.*.resolution",),
    BASE_VIEW: ("align_embedder.target",),
}


def stages_of(setting: str) -> list[str]:
    """The stages whose own result depends on a setting (* for the number of a phase), in order.

    They run again when it changes, and then those that build on them, if the result is another.
    """
    if _within(setting, LAYOUT):
        return []
    if setting == f"{PHASE}.data" or setting.startswith(f"{PHASE}.data."):  # the phase's own stages for its pictures
        found = stages_of(setting.removeprefix(f"{PHASE}.")) if setting.count(".") > 3 else [folders.DATA]
        return [stage for stage in found if stage in (folders.DATA, folders.LATENTS)]
    behind = {
        stage: [inner for name in names for inner in FACTS.get(name, (name,))] for stage, names in DEPENDS.items()
    }
    return [stage for stage, names in behind.items() if _within(setting, names)]


def _within(setting: str, names: Iterable[str]) -> bool:
    return any(setting == name or setting.startswith(f"{name}.") for name in names)


def kind_of(stage: str) -> str:
    """Key of a stage in DEPENDS: "adapt-2" -> "adapt", "surgery-low" -> "surgery"."""
    stage = without_expert(stage)
    name, _, number = stage.rpartition("-")
    return name if number.isdigit() else stage


def without_expert(stage: str) -> str:
    """Name of a stage without the one of its network: "adapt-2-low" -> "adapt-2"."""
    return next((stage.removesuffix(f"-{name}") for name in EXPERT_NAMES if stage.endswith(f"-{name}")), stage)


def inputs(job: Job, stage: str, number: int = 0) -> dict[str, Any]:
    """Today's values of what ``stage`` depends on, by name; ``number``: of its phase (the first is 1)."""
    settings = result_settings(job.recipe)
    counted = [name for name in DEPENDS[kind_of(stage)] if _counts(job, stage, number, name)]
    found = {name.replace("*", str(number - 1)): _value(job, settings, name, number) for name in counted}
    return {**found, "stage version": VERSIONS[kind_of(stage)]}


def recorded(job: Job, stage: str, old: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a marker holds, by today's names.

    Earlier ones know all files of the source as one fact, and no other target of the alignment than pooled.
    """
    if (
        stage == folders.LATENTS and job.is_aligned and BASE_VIEW not in old
    ):  # it had the base's latents of every phase, at its size
        return {**old, BASE_VIEW: _pooled_view(job)}
    if SOURCE not in old or NETWORK not in DEPENDS[kind_of(stage)]:
        return old
    rest = {name: value for name, value in old.items() if name != SOURCE}
    return {**rest, NETWORK: _network(job, old[SOURCE])}


def _network(job: Job, contents: dict[str, str]) -> dict[str, str]:
    """Of the hashes of the source's files those that belong to no other component than the network."""
    others = job.source.parts.keys() - {job.expert.component or job.family.component}
    return {name: digest for name, digest in contents.items() if name.partition("/")[0] not in others}


def _counts(job: Job, stage: str, number: int, name: str) -> bool:
    """Whether a setting has a part in this job's result of the stage."""
    if name == FRAMES:
        return bool(job.frames)
    if kind_of(stage) == folders.DATA:
        own = job.recipe.data.kind == "folder"
        if (name == BEYOND and job.beyond is None) or (
            name == SOURCES and not (job.family.fewest_references or edited.drawn(job))
        ):
            return False
        if name == SHAPE:  # markers from before squares were not the only shape do not name it
            return not own and len({*job.drawn_size}) > 1
        return name not in DRAWN if own else name != PICTURES
    if name == BASE_VIEW:
        return job.is_aligned
    if name == TIMES:
        return len(job.source.experts) > 1
    if name == START:
        return job.recipe.starts_along_gradient(number)
    if name == OPTIMIZER:  # markers from before it was a setting do not name the one that there was
        return job.recipe.adapt.optimizer != "adamw"
    if name == "merge_lora" and kind_of(stage) == MERGE:
        return number == len(job.recipe.adapt.phases)
    return True


def _value(job: Job, settings: dict[str, Any], name: str, number: int) -> Any:
    facts: dict[str, Callable[[], Any]] = {
        SOURCE: job.source.contents,
        NETWORK: lambda: _network(job, job.source.contents()),
        AUTOENCODER: lambda: job.ae.fingerprint,
        RESOLUTION: lambda: job.resolution,
        TIMES: lambda: [*job.expert.within],
        PICTURES: lambda: _given(job),
        SOURCES: lambda: _edited(job),
        FRAMES: lambda: job.frames,
        BEYOND: lambda: [job.beyond.shift] if job.beyond else [],
        SHAPE: lambda: [*job.drawn_size],
        CAPTIONS: lambda: _captions(job, job.recipe.data.count),
        "data.prompts": lambda: _prompts(job),
        "latents.text_length": lambda: job.text_length,
        "latents": lambda: {**settings["latents"], "text_length": job.text_length},
        "adapt.phases.resolution": lambda: job.resolutions,
        PHASE: lambda: {key: value for key, value in settings["adapt"]["phases"][number - 1].items() if key != "data"},
        BASE_VIEW: lambda: {**_pooled_view(job), "side": job.alignment.side},
        "align_embedder": lambda: _embedder(job, settings["align_embedder"]),
        "align_head": lambda: _head(settings["align_head"]),
    }
    if name in facts:
        return facts[name]()
    value: Any = settings
    for part in name.split("."):
        value = value[part]
    return value


def _pooled_view(job: Job) -> dict[str, int]:
    """The resolution of the first phase, and the size at which the base sees its pictures when it pools."""
    return dict.fromkeys(("resolution", "side"), job.recipe.adapt.phases[0].resolution)


def _embedder(job: Job, section: dict[str, Any]) -> dict[str, Any]:
    """The settings that the method and the target read."""
    read = {"ridge": ("ridge",), "adamw": ("steps", "lr", "batch"), "none": ()}[section["method"]]
    home = job.alignment.target == "home"
    target = {"target": "home"} if home else {"pooling": section["pooling"] or "average"}  # as earlier markers say it
    return {**{key: section[key] for key in ("method", *read)}, **target}


def _head(section: dict[str, Any]) -> dict[str, Any]:
    return section if section["steps"] else {key: section[key] for key in ("method", "draws", "steps")}


def _prompts(job: Job) -> str:
    """The kind of prompts, or the hash of the file's bytes, or of the texts of several files."""
    name = job.recipe.data.prompts
    if name in prompts.KINDS:
        return name
    path, column = prompt_lists.place_of(name)
    if path.is_file():
        return sha256(path) + (f":{column}" if column else "")
    return fingerprint(sorted(captions.prompt_list(job).texts)) if path.exists() or hub.is_address(name) else name


def _given(job: Job) -> str | None:
    """Hash of the user's pictures and captions. Where they are gone: the recorded one, a run can go on without them."""
    marker = job.folders.data / MARKER
    recorded = read_object(marker)["inputs"].get(PICTURES) if marker.exists() else None
    if not given.are_here(job.pictures_from):
        return recorded
    try:
        return fingerprint(sorted(_rows(job, job.given)))
    except AccessError:  # a data set of the hub that is no longer in the cache
        if recorded is None:
            raise
        return str(recorded)


def _edited(job: Job) -> str | None:
    """Hash of the pictures that the base edits. Where they are gone: the recorded one."""
    if (found := edited.contents(job)) is not None:
        return fingerprint(found)
    marker = job.folders.data / MARKER
    recorded: str | None = read_object(marker)["inputs"].get(SOURCES) if marker.exists() else None
    return recorded


def _row(root: Path, picture: Picture) -> tuple[str, ...]:
    """What makes a picture the same one in another place; of an edited one, what it was made from too."""
    return os.path.relpath(picture.file, root), picture.caption, str(picture.sha256), *picture.references_sha256


def _captions(job: Job, count: int) -> str:
    return fingerprint(texts_of(job, count))


def data_continues(job: Job, old: dict[str, Any]) -> str | None:
    """Pictures are kept one by one: more of them are added to those that are there."""
    if set(differing(inputs(job, folders.DATA), old)) - set(GROWS):
        return None
    count = job.recipe.data.count
    if job.recipe.data.kind == "folder":
        before, now = (
            _rows_in(job, job.folders.data / images.INDEX),
            set(_rows(job, job.given)),
        )
        return f"{len(before)} -> {len(now)} pictures" if before and before <= now else None
    before_count = int(old["data.count"])
    texts, earlier = texts_of(job, count), texts_of(job, before_count)
    same = fingerprint(earlier) == old[CAPTIONS]
    fits = all(mine == other for mine, other in zip(texts, earlier, strict=False))
    return f"{before_count} -> {count} pictures" if same and fits else None


def latents_continue(job: Job, old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """New pictures are appended to the rows that are there, if no row is gone or changed."""
    if differing(new, old) != ["before"]:
        return None
    before, now = _rows_in(job, job.folders.latents / images.ROWS), _rows_in(job, job.folders.data / images.INDEX)
    return f"{len(now - before)} new pictures are appended to {len(before)}" if before and before <= now else None


def _rows(job: Job, pictures: list[Picture]) -> list[tuple[str, ...]]:
    return [_row(job.pictures_root, picture) for picture in pictures]


def _rows_in(job: Job, index: Path) -> set[tuple[str, ...]]:
    if not index.exists():
        return set()
    return set(_rows(job, images.read_index(index, job.pictures_root)))


def training_continues(job: Job, stage: str, old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """A longer phase goes on from its last step; an unfinished one with a lower rate or clip too."""
    from dcgen_convert.train.checkpoints import latest

    changes: dict[str, tuple[float, float]] = {}
    for name in differing(new, old):
        mine, other = _leaf(new, name), _leaf(old, name)
        if not name.endswith((".steps", ".lr", ".clip")) or not isinstance(mine, int | float) or not mine or not other:
            return None
        changes[name] = (other, mine)
    folder = job.folders.own(stage)
    found = latest(folder / (names.TRAINING if stage == folders.ALIGN_HEAD else "") / names.CHECKPOINTS)
    finished = (folder / MARKER).exists()
    for name, (before, now) in changes.items():
        grows = name.endswith(".steps") and found is not None and now >= found[1]["step"]
        lower = not name.endswith(".steps") and not finished and now < before
        if not grows and not lower:
            return None
    if found is None or not changes:
        return None
    shown = ", ".join(f"{name} {before:g} -> {now:g}" for name, (before, now) in changes.items())
    phase = next((value for value in new.values() if isinstance(value, dict) and "schedule" in value), {})
    stretched = phase.get("schedule") == "cosine" and any(name.endswith(".steps") for name in changes)
    note = "; the cosine ends at the new last step, so the rate jumps here" if stretched else ""
    return f"from step {found[1]['step']} on: {shown}{note}"


def _leaf(values: dict[str, Any], name: str) -> Any:
    """Value of a dotted name in a record of inputs, whose own keys have dots too; None if it has none."""
    for key, value in values.items():
        if key == name:
            return value
        if name.startswith(f"{key}.") and isinstance(value, dict):
            return _leaf(value, name[len(key) + 1 :])
    return None
