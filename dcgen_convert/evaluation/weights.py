"""The networks of the measures: found in a folder or in the hub's cache, checked, loaded.

Only safetensors are read, and no code that lies beside them is run.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcgen_convert.core.bars import quiet_transformers
from dcgen_convert.core.errors import AccessError, InputError, is_out_of_memory
from dcgen_convert.core.files import hashes, read_object
from dcgen_convert.core.journal import fingerprint

FILES = ["*.json", "*.txt", "model*.safetensors"]  # of a repository: never a pickle
TOKENIZER = ["*.json", "*.txt"]
FETCH = "fetch the checkpoint again"


class NotAtHand(AccessError):
    """What a measure needs is not on this machine, and the user has not said where else it is."""


@dataclass(frozen=True)
class Needed:
    """A network that a measure needs.

    Attributes:
        what: in words, such as "a CLIP model".
        kind: model_type in its config.json.
        option: of the command line or of a recipe, which says where it lies.
        usual: hub id that is taken where the option is not given.
    """

    what: str
    kind: str
    option: str
    usual: str

    @property
    def in_recipe(self) -> Needed:
        """The same with the name of its setting in a recipe."""
        return replace(self, option=setting_of(self.option))

    def given_as(self, value: str) -> str:
        """How the user says where it lies."""
        return f"{self.option} {value}" if self.option.startswith("--") else f"--set {self.option}={value}"


def setting_of(option: str) -> str:
    """The setting of a recipe that an option of the command line stands for: "--clip" -> "evaluate.clip"."""
    return f"evaluate.{option.removeprefix('--')}"


def find(given: str | None, needed: Needed, *, fetch: bool, asked: bool, recipe: bool = False) -> Path:
    """The folder of the network: the one that was given, else the usual one in the hub's cache, else fetched.

    Args:
        given: a folder or a hub id; None: the usual one.
        fetch: whether what the cache lacks may be fetched. The usual one is fetched only where ``asked``.
        asked: the measure was asked for by its name.
        recipe: errors name the setting of the recipe, not the option of the command line.

    Raises:
        InputError: a path that does not exist, a model of another kind, or one without safetensors.
        NotAtHand: nothing was given, and the usual one is not in the cache and was not fetched.
        AccessError: the hub id that was given is not in the cache and was not fetched.
    """
    needed = needed.in_recipe if recipe else needed
    if given is not None:
        folder = local(given, needed.option)
        if folder is None:
            folder = cached(given, FILES, fetch)
        if folder is None:
            raise AccessError(
                f"{given}, which {needed.option} names, is not in the local cache and cannot be fetched",
                f"connect to the network, or give a folder: {needed.given_as('FOLDER')}",
            )
    else:
        folder = cached(needed.usual, FILES, fetch and asked)
        if folder is None:
            raise NotAtHand(
                f"there is no {needed.what.partition(' ')[2]} at hand",
                f"give one with {needed.given_as('FOLDER or REPO')}; {needed.usual} fits",
            )
    return checked(folder, needed)


def local(given: str, option: str) -> Path | None:
    """The folder that a user's text names; None where it is a hub id. InputError for another path."""
    path = Path(os.path.expanduser(given))
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path}, which {option} names, is a file; a folder is wanted", f"{option} FOLDER or REPO")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given):
        raise InputError(f"{option} names {given[:200]!r}, which does not exist", f"{option} FOLDER or ORG/NAME")
    return None


def cached(repo: str, patterns: list[str], fetch: bool) -> Path | None:
    """The folder of a hub repository with a config or a tokenizer in it; None where it is not at hand.

    The cache comes first, so that what was used once works without the network, and stays the same.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for only_local in (True, False) if fetch else (True,):
        try:
            folder = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=only_local))
        except LocalEntryNotFoundError:
            continue
        if not only_local or _whole(folder, patterns):
            return folder
    return None


def _whole(folder: Path, patterns: list[str]) -> bool:
    """Whether a snapshot in the cache has a file of every kind that is needed; it may have been fetched for less."""
    kinds = [pattern for pattern in patterns if pattern != "*.txt"]
    return all(any(file.is_file() for file in folder.glob(pattern)) for pattern in kinds)


def checked(folder: Path, needed: Needed) -> Path:
    """``folder``, unless its config names another kind of model or it has no safetensors: InputError."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder}, which {needed.option} names, has no config.json", f"give {needed.what}")
    kind = read_object(file).get("model_type")
    if kind != needed.kind:
        raise InputError(
            f"{folder} holds a model of type {str(kind)[:80]}, and {needed.option} needs {needed.what}",
            f"{needed.usual} fits",
        )
    if not any(folder.glob("model*.safetensors")):
        raise InputError(
            f"{folder} has no model.safetensors; pickles are not read", f"{needed.option} takes one that has it"
        )
    return folder


def fingerprint_of(*folders: Path) -> str:
    """Hash of the files of networks and tokenizers that are read: their names and their contents."""
    files = [file for folder in folders for pattern in FILES for file in sorted(folder.glob(pattern))]
    return fingerprint([[file.name, digest] for file, digest in zip(files, hashes(files), strict=True)])


def load(cls: Any, folder: Path, device: str, attention: str = "sdpa") -> Any:
    """The network of class ``cls`` of transformers in ``folder``, in float32 and for inference.

    Args:
        attention: implementation; one that the class has.

    Raises:
        InputError: it does not load, or lacks tensors that its config asks for.
    """
    import torch

    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=attention,  # whatever the config says: it may name code on the hub
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
            )
    except (ImportError, ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{folder} does not load: {first_line(error)}", FETCH) from error
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost:
        raise InputError(
            f"{folder} lacks {len(lost)} tensors of its {cls.__name__}, which would be random: {', '.join(lost[:3])}",
            FETCH,
        )
    return model.eval().requires_grad_(False).to(device)


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
