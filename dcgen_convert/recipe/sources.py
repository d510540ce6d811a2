"""Which recipe a SOURCE on the command line gets, and what the recipe leaves to the source.

SOURCE is a recipe, a .yaml file, a catalogue name, a folder, a .safetensors or .gguf file, or a hub id.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.core.limits import require_text, shown
from dcgen_convert.families import Family, catalog
from dcgen_convert.recipe import shelf
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.reader import HUB_ID
from dcgen_convert.recipe.schema import Recipe

SUFFIXES = (".safetensors", ".gguf")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def recipe_for(source: Identity, chosen: str | None) -> tuple[str, bool]:
    """(recipe name or path, whether the source replaces the one that the recipe names).

    Args:
        chosen: the recipe that the user named for this source.
    Raises:
        InputError: nothing has that name (the nearest name is told), a pickle, or a family without a recipe.
        AccessError: a hub id whose config is not in the cache, while the network is off.
    """
    if chosen is not None:
        require_source(source)
        return chosen, True
    if shelf.find(source.name) is not None:
        return source.name, False
    if source.entry is not None:
        return source.entry.recipe, True
    require_source(source)
    return source.family.recipe, True


def family_defaults(source: Identity) -> dict[str, Any]:
    """What the general recipe leaves to the family: steps, guidance, the loss that its kind of guidance needs.

    Text embeddings of a family whose text encoder sees the references are large, and each row has its own: they are not
    stored.
    """
    family = source.family
    drawing = {"steps": family.default_steps, "guidance": family.default_guidance}
    distilled = family.guidance == "embedded" and source.config.get("guidance_embeds")
    found = {
        "data": drawing,
        "bundle": drawing,
        "adapt": {"objective": "guidance-corrected" if distilled else "flow"},
    }
    return {**found, "latents": {"text": "encode"}} if family.picture_tokens else found


def check_few_steps(recipe: Recipe, family: Family, index: Mapping[str, Any] | None) -> None:
    """Refuse to train a few-step model with flow matching alone: the result would need many steps again.

    Args:
        index: model_index.json of its pipeline; None when that is not here yet.
    Raises:
        InputError: the model was distilled to a few steps, and the last phase has no consistency distillation.
    """
    distilled = family.few_steps or bool(index and index.get("is_distilled"))
    if distilled and not recipe.adapt.phases[-1].consistency:
        raise InputError(
            f"{recipe.source} was distilled to a few steps, which flow matching alone undoes",
            "end with consistency distillation: --recipe few-steps, or --set "
            f"adapt.phases.{len(recipe.adapt.phases) - 1}.consistency=0.9; "
            "or give the undistilled model",
        )


def require_access(recipe: Recipe, source: Identity) -> None:
    """Ask the hub for one small file of every repository that the recipe names, before anything else is begun.

    Args:
        source: what the recipe's source is.
    Raises:
        AccessError, or an error of the hub's client that says the same: gated, private, unknown, not reachable, or not
            in the cache while the network is off.
    """
    ae = catalog.find_autoencoder(recipe.ae)
    _ask(source.where, recipe.revision or source.revision, "model_index.json", source.offline)
    _ask(recipe.base or "", None, "model_index.json", source.offline)
    _ask(ae.where if ae else recipe.ae, None, "config.json", source.offline)


def _ask(repo: str, revision: str | None, name: str, offline: bool) -> None:
    if not HUB_ID.fullmatch(repo) or Path(repo).expanduser().exists():
        return  # it is on this machine
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if isinstance(try_to_load_from_cache(repo, name, revision=revision), str):
        return
    if offline or constants.HF_HUB_OFFLINE:
        if not (Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots").is_dir():
            raise AccessError(
                f"{repo} is not in the local cache and cannot be fetched", "connect to the network, or give a folder"
            )
        return
    try:
        hf_hub_download(repo, name, revision=revision)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return  # the repository is there, in another form


def require_source(source: Identity) -> None:
    """InputError when the name cannot be a source at all."""
    name = source.name
    require_text("SOURCE", name)
    suffix = Path(name).suffix
    if suffix in PICKLES:
        raise InputError(
            f"{name} is a pickle checkpoint, which is refused because loading it runs code",
            "convert it to safetensors first",
        )
    if source.entry is not None or source.path is not None:
        return
    if suffix in SUFFIXES or name.startswith(("/", "./", "../", "~")):
        raise InputError(f"no such file or folder: {shown(name)[1:-1]}", "check the path")
    if HUB_ID.fullmatch(name):
        return
    known = [*shelf.names(), *catalog.SOURCES]
    raise InputError(
        f"unknown source {shown(name)}{shelf.nearest(name, known)}",
        "dcgen-convert recipes list; or a folder, a .safetensors, a .gguf, or ORG/NAME",
    )


def short_name(source: str) -> str:
    """A name for folders: the last part of a path or hub id, without suffix."""
    name = Path(source).name
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name) or "model"
