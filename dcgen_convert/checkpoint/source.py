"""The base model: a diffusers pipeline folder, found from a name, a path or a hub id, recognised from its headers."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dcgen_convert import families
from dcgen_convert.checkpoint.headers import Entry, read_weights
from dcgen_convert.errors import AccessError, InputError
from dcgen_convert.families import Family
from dcgen_convert.files import read_json, sha256

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

    @property
    def transformer(self) -> Path:
        return self.root / "transformer"

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
        return read_json(path)

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.transformer / "config.json"
        if not path.is_file():
            raise InputError(f"{self.root} has no transformer/config.json", "give a diffusers folder or a hub id")
        config = read_json(path)
        if "quantization_config" in config:
            raise InputError(
                f"{self.root} is already quantised ({config['quantization_config'].get('quant_method')})",
                "give the dense model",
            )
        return config

    @cached_property
    def family(self) -> Family:
        family = families.recognise(self.config.get("_class_name"))
        if family is None:
            known = ", ".join(f.model_class for f in families.FAMILIES.values())
            raise InputError(
                f"{self.root} holds a {self.config.get('_class_name')}, no family converts it", f"known: {known}"
            )
        return family

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor of the transformer, from headers alone."""
        return read_weights(self.transformer)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the transformer and VAE: of all bytes below 1 GiB, else of headers, sizes and modification times."""
        digest = hashlib.sha256()
        for part in (self.transformer, self.vae):
            for path in sorted(p for p in part.glob("*") if p.suffix in (".json", ".safetensors")):
                stat = path.stat()
                digest.update(f"{part.name}/{path.name} {stat.st_size} ".encode())
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
        raise InputError(
            f"{path} is a file, a diffusers folder is wanted", "give the folder that holds model_index.json"
        )
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


def load_source(name: str, repo_or_path: str, *, revision: str | None = None, offline: bool = False) -> Source:
    """Resolve and check the base model: family known, weights complete by their headers."""
    patterns = [
        "*.json",
        "*.txt",
        "*.model",
        "*.md",
        "LICENSE*",
        "transformer/*.safetensors",
        "vae/*.safetensors",
        "text_encoder*/*.safetensors",
    ]
    root, revision = resolve_folder(repo_or_path, revision=revision, offline=offline, patterns=patterns)
    source = Source(name, root, revision)
    _ = source.index, source.family, source.tensors
    known = (source.family.pipeline_class, *source.family.other_pipelines)
    if source.index.get("_class_name") not in known:
        raise InputError(
            f"{root} is a {source.index.get('_class_name')}, only {' and '.join(known)} can be converted with a "
            f"{source.family.model_class}",
            "inpainting, editing and step-distilled variants need inputs that the conversion does not train",
        )
    if source.index.get("is_distilled"):
        raise InputError(
            f"{root} is distilled to a few steps (is_distilled), which flow matching would undo",
            "give the undistilled model",
        )
    for module in (source.family.embedder, source.family.head):
        if f"{module}.weight" not in source.tensors:
            raise InputError(
                f"{root}/transformer lacks {module}.weight, which every {source.family.name} model has",
                "is the checkpoint complete?",
            )
    return source
