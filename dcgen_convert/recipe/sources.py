"""What SOURCE on the command line is: a recipe, a .yaml, a catalogue name, a folder, a .safetensors or .gguf file, or a
hub id.

Only small JSON files and safetensors headers are read here; no weights, no torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from dcgen_convert import families
from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.core.files import read_object
from dcgen_convert.families import catalog
from dcgen_convert.recipe import schema, shelf

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


SUFFIXES = (".safetensors", ".gguf")


def recipe_for(source: str, chosen: str | None, offline: bool, base: str | None = None) -> tuple[str, str | None]:
    """(recipe name or path, source to put into it or None when the recipe names its own).

    Raises:
        InputError: nothing of that name (with the nearest name), a pickle, or a family without recipe.
        AccessError: a hub id whose family cannot be known offline.
    """
    if chosen is not None:
        return chosen, _checked(source)
    if shelf.find(source) is not None:
        return source, None
    entry = catalog.find_source(source)
    if entry is not None:
        return entry.recipe, source
    return family_of(transformer_config(_checked(source), offline, base), source).recipe, source


def family_defaults(source: str, offline: bool, base: str | None = None) -> dict:
    """What the general recipe leaves to the family: steps, guidance, and the loss that its kind of guidance needs."""
    config = transformer_config(source, offline, base)
    family = family_of(config, source)
    drawing = {"steps": family.default_steps, "guidance": family.default_guidance}
    distilled = family.guidance == "embedded" and config.get("guidance_embeds")
    return {
        "data": drawing,
        "bundle": drawing,
        "adapt": {"objective": "guidance-corrected" if distilled else "flow"},
    }


def check_few_steps(recipe: schema.Recipe, family: families.Family, folder: Path) -> None:
    """InputError for a model of few steps with a recipe that would leave it in need of many.

    folder: its pipeline's; one that is not here yet says nothing.
    """
    index = folder / "model_index.json"
    distilled = family.few_steps or (index.is_file() and read_object(index).get("is_distilled"))
    if distilled and not recipe.adapt.phases[-1].consistency:
        raise InputError(
            f"{recipe.source} was distilled to a few steps, which flow matching alone undoes",
            "end with consistency distillation: --recipe few-steps, or --set "
            f"adapt.phases.{len(recipe.adapt.phases) - 1}.consistency=0.9; "
            "or give the undistilled model",
        )


def doubt(family: families.Family, source: str, folder: Path | None) -> str | None:
    """A sentence where SOURCE may be a variant that a conversion does not suit.

    folder: its pipeline's; None where that is not here, or is another model's, which the source is completed with.
    """
    config = folder / "scheduler" / "scheduler_config.json" if folder else None
    return family.doubt(source, read_object(config) if config and config.is_file() else {})


def _checked(source: str) -> str:
    """SOURCE when it can be one at all."""
    path = Path(source).expanduser()
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        raise InputError(
            f"{source} is a pickle checkpoint, which is refused because loading it runs code",
            "convert it to safetensors first",
        )
    if catalog.find_source(source) or path.exists():
        return source
    if path.suffix in SUFFIXES or source.startswith(("/", "./", "../", "~")):
        raise InputError(f"no such file or folder: {source}", "check the path")
    if HUB_ID.match(source):
        return source
    known = [*shelf.names(), *catalog.SOURCES]
    raise InputError(
        f"unknown source {source!r}{shelf.nearest(source, known)}",
        "dcgen-convert recipes list; or a folder, a .safetensors, a .gguf, or ORG/NAME",
    )


def short_name(source: str) -> str:
    """A name for folders: the last part of a path or hub id, without suffix."""
    name = Path(source).name
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name) or "model"


def family_of(config: dict, where: str) -> families.Family:
    """The family of a transformer's config; InputError when none of ours claims it."""
    family = families.recognise(config)
    if family is None:
        classes = dict.fromkeys(family.model_class for family in families.FAMILIES.values())
        raise InputError(
            f"{where}: the class {config.get('_class_name', '(none)')} has no family here",
            f"supported: {', '.join(classes)}",
        )
    return family


def transformer_config(source: str, offline: bool = False, base: str | None = None) -> dict:
    """The transformer's config of any SOURCE: catalogue file, folder, single-file header, hub cache or hub.

    base: the pipeline that a single file belongs to, if the user named one: its config says what no tensor shape tells.
    """
    entry = catalog.find_source(source)
    if entry is not None:
        return entry.transformer_config()
    path = Path(source).expanduser()
    if path.is_dir():
        return read_config(families.network_folder(path) / "config.json", path / "config.json")
    if path.is_file():
        from dcgen_convert.checkpoint.single import read_single

        single = read_single(path)
        return single.config(None if base is None else transformer_config(base, offline))
    return hub_config(source, offline)


def hub_config(repo: str, offline: bool) -> dict:
    """Config of the network of a hub repository, whatever its folder is called; errors as `hub_json`."""
    from huggingface_hub.errors import EntryNotFoundError

    first, *others = families.COMPONENTS
    try:
        return hub_json(repo, f"{first}/config.json", offline)
    except (AccessError, EntryNotFoundError):
        for name in others:
            try:
                return hub_json(repo, f"{name}/config.json", offline)
            except (AccessError, EntryNotFoundError):
                continue
        raise


def read_config(*candidates: Path) -> dict:
    """The first existing JSON file of `candidates`."""
    for path in candidates:
        if path.is_file():
            return read_object(path)
    raise InputError(
        f"no config found: {candidates[0]} does not exist", "give a diffusers folder (the one with model_index.json)"
    )


def hub_json(repo: str, filename: str, offline: bool, revision: str | None = None) -> dict:
    """A small JSON file of a hub repository, from the cache first.

    Raises:
        AccessError: not cached and offline.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, filename, revision=revision)
    if isinstance(cached, str):
        return json.loads(Path(cached).read_text(encoding="utf-8"))
    if offline or constants.HF_HUB_OFFLINE:
        raise AccessError(
            f"{filename} of {repo} is not in the cache and the network is off",
            "drop --offline, or give a local folder, or name a --recipe",
        )
    return json.loads(Path(hf_hub_download(repo, filename, revision=revision)).read_text(encoding="utf-8"))
