"""The base model: a diffusers pipeline folder, found from a name, a path or a hub id, recognised from its headers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from dcgen_convert import families
from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.components import plan_copy
from dcgen_convert.checkpoint.headers import Entry, read_weights
from dcgen_convert.checkpoint.licence import FILES as LICENCES
from dcgen_convert.checkpoint.record import source_record
from dcgen_convert.checkpoint.trust import is_component
from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.core.files import hashes, read_object
from dcgen_convert.core.journal import fingerprint
from dcgen_convert.families import Expert, Family, authors, legacy

# What a conversion takes of a hub repository, the base model's and that of a base which only completes a transformer.
_REST = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", *LICENCES]
_REST += [f"{part}/*.safetensors" for part in ("vae", "text_encoder*", "image_encoder", "safety_checker")]
WHOLE, COMPLETING = [*_REST, *(f"{name}/*.safetensors" for name in families.EVERY_COMPONENT)], _REST
CONTENT = (".json", ".safetensors", ".txt", ".model", ".jinja", ".tiktoken")  # files that change what is computed


@dataclass(frozen=True)
class Source:
    """A resolved diffusers pipeline folder.

    Attributes:
        name: what the user asked for.
        root: folder with model_index.json.
        revision: commit of a hub snapshot, None for local folders.
        component: which of its networks is meant; empty: the first one, or the only one.
        known: what `contents` has found already.
    """

    name: str
    root: Path
    revision: str | None = None
    component: str = ""
    known: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    imported: ClassVar[bool] = False  # whether stage `import` writes the folder

    def of_experts(self) -> list[Source]:
        """This source, once for each of its networks; itself for the only one."""
        return [self.of_expert(expert) if expert.name else self for expert in self.experts]

    def of_expert(self, expert: Expert) -> Source:
        """The same source, of which another network is meant. Both hash the files once."""
        found = replace(self, component=expert.component)
        object.__setattr__(found, "known", self.known)
        return found

    @property
    def transformer(self) -> Path:
        return self.root / self.component if self.component else families.network_folder(self.root)

    @property
    def vae(self) -> Path:
        return self.root / "vae"

    @cached_property
    def index(self) -> dict[str, Any]:
        path = self.root / "model_index.json"
        if not path.is_file():
            raise InputError(
                f"{self.root} has no model_index.json: not a diffusers pipeline folder",
                "give a diffusers folder or a hub id",
            )
        index = read_object(path)
        authors.refuse(index, self.name)
        odd = next(
            (part for part, value in index.items() if is_component(value) and not re.fullmatch(r"\w[\w.-]*", part)),
            None,
        )
        if odd is not None:
            raise InputError(
                f"{path} names the component {odd!r}, which is no folder name", "fetch the checkpoint again"
            )
        trust.require(self.root, index, "give a checkpoint whose parts are classes of diffusers and transformers")
        return index

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.transformer / "config.json"
        if not path.is_file():
            raise InputError(
                f"{self.root} has no {path.parent.name}/config.json", "give a diffusers folder or a hub id"
            )
        config = legacy.current(read_object(path))
        if "quantization_config" in config:
            raise InputError(
                f"{self.root} is already quantised ({_method(config['quantization_config'])})",
                "give the dense model",
            )
        return config

    @cached_property
    def family(self) -> Family:
        return families.family_of(self.config, self.root, self.index)

    @cached_property
    def experts(self) -> tuple[Expert, ...]:
        """The networks that it draws with."""
        return self.family.experts(self.index)

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """Config of the pipeline's scheduler; None where there is none."""
        path = self.root / "scheduler" / "scheduler_config.json"
        return read_object(path) if path.is_file() else None

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor of the transformer, from headers alone."""
        return read_weights(self.transformer)

    @property
    def content_files(self) -> dict[str, Path]:
        """Name -> file, of all files that a conversion's result depends on: weights, configs, tokenizers, scheduler.

        The names do not tell where the source lies, so a folder that was moved is the same source.
        """
        index = {"model_index.json": self.root / "model_index.json"} if not self.imported else {}
        return index | {
            f"{part}/{plain}": folder / name
            for part, folder in sorted(self.parts.items())
            if folder.is_dir()
            for name, plain in plan_copy(folder).items()
            if Path(name).suffix.lower() in CONTENT
        }

    def contents(self, advance: Callable[[int], object] | None = None) -> dict[str, str]:
        """Name -> SHA-256 of every file of `content_files`. The files are read once, at the disk's speed.

        Args:
            advance: is told the number of bytes of each file that was read.
        """
        if not self.known:
            files = self.content_files
            self.known.update(zip(files, hashes(files.values(), advance), strict=True))
        return dict(self.known)

    @property
    def fingerprint(self) -> str:
        """One hash of `contents`."""
        return fingerprint(self.contents())

    @property
    def parts(self) -> dict[str, Path]:
        """Component -> its folder, of all that model_index.json names as classes."""
        return {part: self.root / part for part, value in self.index.items() if is_component(value)}

    @property
    def files(self) -> tuple[Path, ...]:
        """Weight files outside of any component's folder."""
        return ()

    def record(self, name: str) -> dict[str, Any]:
        """What the manifest says of this source, which the user called ``name``."""
        return source_record(name, self.root, self.revision)


def _method(quantisation: Any) -> str:
    return str(quantisation.get("quant_method")) if isinstance(quantisation, dict) else "unknown method"


def resolve_folder(
    repo_or_path: str, *, revision: str | None = None, offline: bool = False, patterns: list[str] | None = None
) -> tuple[Path, str | None]:
    """A local folder for a path or a hub id (downloaded into the hub cache): (folder, commit)."""
    if (path := folder_at(repo_or_path)) is not None:
        return path.resolve(), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(repo_or_path, revision=revision, local_files_only=offline, allow_patterns=patterns)
        )
    except LocalEntryNotFoundError as error:
        raise AccessError(
            f"{repo_or_path} is not in the local cache and cannot be fetched",
            "connect to the network, or give a folder",
        ) from error
    return folder, folder.name


def folder_at(repo_or_path: str) -> Path | None:
    """The local folder that is meant; None for a hub id.

    Raises:
        InputError: it is a file, or a path that does not exist.
    """
    path = Path(os.path.expanduser(repo_or_path))
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path} is a file, a folder is wanted", "give the folder that holds its config.json")
    if repo_or_path.count("/") != 1 or repo_or_path.startswith((".", "/", "~")):
        raise InputError(
            f"{repo_or_path} does not exist", "give a recipe, a catalogue name, a folder or a hub id (org/name)"
        )
    return None


def check_scheduler(root: Path, family: Family) -> None:
    """InputError for a pipeline whose scheduler the family cannot follow."""
    path = root / "scheduler" / "scheduler_config.json"
    if path.is_file():
        family.check_scheduler(read_object(path))


def check_variant(index: Mapping[str, Any], family: Family, where: Path) -> None:
    """InputError for pipelines of another task than drawing from text."""
    if index.get("_class_name") not in family.pipelines:
        raise InputError(
            f"{where} is a {index.get('_class_name')}, only {' and '.join(family.pipelines)} can be converted with a "
            f"{family.model_class}",
            "inpainting and editing variants need inputs that the conversion does not train",
        )
