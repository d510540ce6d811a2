"""The base model: a diffusers pipeline folder, found from a name, a path or a hub id, recognised from its headers."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from dcgen_convert import families
from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.headers import Entry, read_weights
from dcgen_convert.checkpoint.record import source_record
from dcgen_convert.checkpoint.trust import is_component
from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.core.files import read_object, sha256
from dcgen_convert.families import Family

# What a conversion takes of a hub repository, the base model's and that of a base which only completes a transformer.
_REST = ["*.json", "*.txt", "*.model", "*.md", "LICENSE*"]
_REST += [f"{part}/*.safetensors" for part in ("vae", "text_encoder*", "safety_checker")]
WHOLE, COMPLETING = [*_REST, *(f"{name}/*.safetensors" for name in families.COMPONENTS)], _REST
HASH_WHOLE = 1 << 30  # bytes; larger weights are fingerprinted by headers and sizes, their full hash is in the manifest


@dataclass(frozen=True)
class Source:
    """A resolved diffusers pipeline folder.

    Attributes:
        name: what the user asked for.
        root: folder with model_index.json.
        revision: commit of a hub snapshot, None for local folders.
    """

    name: str
    root: Path
    revision: str | None = None

    imported: ClassVar[bool] = False  # whether stage `import` writes the folder

    @property
    def transformer(self) -> Path:
        return families.network_folder(self.root)

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
        config = read_object(path)
        if "quantization_config" in config:
            raise InputError(
                f"{self.root} is already quantised ({_method(config['quantization_config'])})",
                "give the dense model",
            )
        return config

    @cached_property
    def family(self) -> Family:
        return families.family_of(self.config, self.root)

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """Config of the pipeline's scheduler; None where there is none."""
        path = self.root / "scheduler" / "scheduler_config.json"
        return read_object(path) if path.is_file() else None

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor of the transformer, from headers alone."""
        return read_weights(self.transformer)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the transformer and VAE: of all bytes below 1 GiB, else of headers, sizes and modification times."""
        return fingerprint_of([self.transformer, self.vae])

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


def fingerprint_of(places: Iterable[Path]) -> str:
    """Hash of files and of the JSON and weight files of folders: of all bytes below 1 GiB, else of size and time."""
    digest = hashlib.sha256()
    for place in places:
        inside = (
            [place] if place.is_file() else sorted(p for p in place.glob("*") if p.suffix in (".json", ".safetensors"))
        )
        for path in inside:
            stat = path.stat()
            digest.update(f"{place.name}/{path.name} {stat.st_size} ".encode())
            whole = stat.st_size <= HASH_WHOLE
            digest.update((sha256(path) if whole else str(stat.st_mtime_ns)).encode())
    return digest.hexdigest()


def resolve_folder(
    repo_or_path: str, *, revision: str | None = None, offline: bool = False, patterns: list[str] | None = None
) -> tuple[Path, str | None]:
    """A local folder for a path or a hub id (downloaded into the hub cache): (folder, commit)."""
    path = Path(os.path.expanduser(repo_or_path))
    if path.is_dir():
        return path.resolve(), None
    if path.exists():
        raise InputError(f"{path} is a file, a folder is wanted", "give the folder that holds its config.json")
    if repo_or_path.count("/") != 1 or repo_or_path.startswith((".", "/", "~")):
        raise InputError(
            f"{repo_or_path} does not exist", "give a recipe, a catalogue name, a folder or a hub id (org/name)"
        )
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


def require_possible(config: Mapping[str, Any], tensors: Mapping[str, object], where: Path) -> None:
    """InputError for a config of more blocks than there are tensors: its class would be built for ever."""
    for key, value in config.items():
        if ("layers" in key or "blocks" in key) and isinstance(value, int) and value > len(tensors):
            raise InputError(
                f"{where}: {key} is {value} where {len(tensors)} tensors are", "is the config the right one?"
            )


def check_scheduler(root: Path, family: Family) -> None:
    """InputError for a pipeline whose scheduler the family cannot follow."""
    path = root / "scheduler" / "scheduler_config.json"
    if path.is_file():
        family.check_scheduler(read_object(path))


def check_variant(index: Mapping[str, Any], family: Family, where: Path) -> None:
    """InputError for pipelines of another task than drawing from text."""
    known = (family.pipeline_class, *family.other_pipelines)
    if index.get("_class_name") not in known:
        raise InputError(
            f"{where} is a {index.get('_class_name')}, only {' and '.join(known)} can be converted with a "
            f"{family.model_class}",
            "inpainting and editing variants need inputs that the conversion does not train",
        )
