"""The single checks of a bundle. Each returns sentences about what differs, none when all is well."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dcgen_convert import families
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.expected import expected_tensors
from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.headers import Entry, read_weights
from dcgen_convert.checkpoint.record import is_hub_file
from dcgen_convert.checkpoint.tensors import tensor_sha256
from dcgen_convert.core import names
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import DcgenError, InputError
from dcgen_convert.core.files import read_json, sha256
from dcgen_convert.networks import parts
from dcgen_convert.svdquant.forms import quantised_formats

SHOWN = 20  # differences that an error lists
# Names that systems and tools give to their own files: macOS, Windows, KDE, NFS, editors, notebooks.
STRAY = re.compile(
    r"\.DS_Store|\._.*|__MACOSX|\.AppleDouble|\.Spotlight-V100|\.Trash.*|\.fseventsd|Thumbs\.db|desktop\.ini|\.directory"
    r"|\.nfs[0-9a-f]+|\.ipynb_checkpoints|__pycache__|\.\w+\.sw[a-p]|.*~|\.git.*|\.idea|\.vscode",
    re.IGNORECASE,
)


def check_files(bundle: Path, manifest: Mapping[str, Any], console: Console) -> list[str]:
    """Every file listed is there with its size and hash; every file there is listed."""
    extra = sorted(present_files(bundle) - {*manifest["files"], manifests.FILE, names.SIGNATURE})
    return check_listed(bundle, manifest, console) + [f"{name} is not in the manifest" for name in extra]


def present_files(bundle: Path) -> set[str]:
    """Relative paths of all files in the folder but those that systems and editors leave there."""
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    return {name for name in found if not is_stray(name)}


def listed(found: Sequence[str]) -> str:
    """The first of many differences, as the end of a sentence."""
    more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
    return f"{'; '.join(found[:SHOWN])}{more}"


def check_listed(bundle: Path, manifest: Mapping[str, Any], console: Console) -> list[str]:
    """Every file listed is there with its size and hash."""
    listed, found = manifest["files"], []
    with console.progress("hash files", len(listed), "file") as bar:
        for name, record in listed.items():
            path = bundle / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif _is_as_before(path, record):
                pass  # a kill came before the new file did
            elif path.stat().st_size != record["bytes"]:
                found.append(f"{name} has {path.stat().st_size} bytes, not {record['bytes']}")
            elif sha256(path) != record["sha256"]:
                found.append(f"{name} has another hash than when it was written{_damaged_tensors(path, manifest)}")
            bar.advance()
    return found


def _is_as_before(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file is the one that was to be replaced."""
    before = record.get(manifests.BEFORE)
    return before is not None and (path.stat().st_size, sha256(path)) == (before["bytes"], before["sha256"])


def is_stray(name: str) -> bool:
    """Whether a relative path is what the hub client, git, a file manager or an editor leaves in a folder."""
    parts = name.split("/")
    return is_hub_file(name) or any(STRAY.fullmatch(part) for part in parts)


def _damaged_tensors(path: Path, manifest: Mapping[str, Any]) -> str:
    """Names of the transformer's tensors in ``path`` whose bytes changed, as an addition to a sentence."""
    if path.parent.name not in families.EVERY_COMPONENT or path.suffix != ".safetensors":
        return ""
    try:
        found = read_weights(path.parent)
    except InputError:
        return " (its header is damaged)"
    table, own = manifest["tensors"], partial(manifests.tensor_key, path.parent.name)
    names = [
        n
        for n, info in found.items()
        if info.file == path and (own(n) not in table or tensor_sha256(info) != table[own(n)]["sha256"])
    ]
    return f" (tensors {', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""


def check_code(bundle: Path, index: Mapping[str, Any]) -> list[str]:
    """No code but this program's lies in the bundle, and its JSON files call for none."""
    try:
        found = trust.foreign(bundle, index)
    except InputError as error:  # a damaged JSON file
        return [error.message]
    found += [trust.describe(bundle, file) for file in trust.foreign_files(bundle)]
    return [f"{sentence} (--trust-remote-code accepts it)" for sentence in dict.fromkeys(found)]


def check_structure(bundle: Path, index: Mapping[str, Any]) -> list[str]:
    """Every component that model_index.json names has its folder, config and in-bundle code."""
    found = []
    for name, value in trust.components(index).items():
        folder = bundle / name
        if not folder.is_dir():
            found.append(f"model_index.json names {name}, which has no folder")
        elif not any(folder.glob("*config.json")):
            found.append(f"{name} has no config")
        elif (
            value[0] not in trust.LIBRARIES and not is_pipeline(value[0]) and not (folder / f"{value[0]}.py").is_file()
        ):
            found.append(f"{name} needs the code {value[0]}.py, which is not in its folder")
    return found


def is_pipeline(library: str) -> bool:
    """Whether diffusers has pipelines of that name, whose own classes an index may name (Stable Diffusion's safety
    checker).
    """
    import diffusers

    return hasattr(diffusers.pipelines, library)


def check_latents(bundle: Path) -> list[str]:
    """What pipelines read of the latents of a video autoencoder in its config is what the class makes of the rest."""
    from dcgen_convert.bundle.layout import video_config

    config = read_json(bundle / "vae" / "config.json")
    if config.get("_class_name") != trust.VIDEO_CLASS:
        return []
    derived = ("latents_mean", "latents_std", "z_dim", "scale_factor_temporal", "scale_factor_spatial")
    wanted = video_config(config)
    return [
        f"vae/config.json says {key} {config.get(key)}, its other values give {wanted[key]}"
        for key in derived
        if config.get(key) != wanted[key]
    ]


def check_tensors(bundle: Path, index: Mapping[str, Any], console: Console) -> list[str]:
    """Names, dtypes and shapes of the transformer and the autoencoder against their classes; no NaN, no infinity.

    The tensors of a class that is part of no library are checked for NaN and infinity only.
    """
    found = []
    for folder in (*families.network_folders(bundle), bundle / "vae"):
        component = folder.name
        try:
            tensors = read_weights(folder)
            custom = trust.is_custom(index.get(component))
            expected, problems = ({}, []) if custom else expected_tensors(folder)
        except DcgenError as error:
            found.append(error.message)
            continue
        found += problems
        found += [f"{component}: {name} is missing" for name in sorted(expected.keys() - tensors.keys())]
        found += [
            f"{component}: {name} is not a tensor of the model"
            for name in sorted(tensors.keys() - expected.keys())
            if not custom
        ]
        for name in sorted(expected.keys() & tensors.keys()):
            info, (dtypes, shape) = tensors[name], expected[name]
            if info.shape != shape or info.dtype not in dtypes:
                found.append(
                    f"{component}: {name} is {info.dtype} {list(info.shape)}, "
                    f"it must be {' or '.join(dtypes)} {list(shape)}"
                )
        found += [f"{component}: {problem}" for problem in check_values(tensors, console)]
    return found


def check_parts(bundle: Path, index: Mapping[str, Any]) -> list[str]:
    """Every text encoder loads with all its tensors and no others, and every tokenizer knows words."""
    try:
        parts.check(bundle, index)
    except DcgenError as error:
        return [error.message]
    return []


def check_values(tensors: Mapping[str, Entry], console: Console) -> list[str]:
    """Names of tensors with NaN or infinity, and of NVFP4 scales that are negative: the kernel reads them unsigned."""
    import torch
    from safetensors import safe_open

    found = []
    with console.progress("check values", len(tensors), "tensor") as bar:
        for file in sorted({info.file for info in tensors.values()}):
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    value = reader.get_tensor(name)
                    if value.dtype == torch.float8_e4m3fn:
                        if value.view(torch.uint8).ge(0x7F).any():  # the sign bit, or NaN
                            found.append(f"{name} holds negative or undefined scales")
                    elif value.is_floating_point() and not torch.isfinite(value).all():
                        found.append(f"{name} holds NaN or infinity")
                    bar.advance()
    return found


def check_table(bundle: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The manifest's table of tensors against the networks' headers and quantisation configs."""
    tensors: dict[str, Entry] = {}
    formats: dict[str, str] = {}
    for folder in families.network_folders(bundle):
        try:
            own = read_weights(folder)
        except InputError:
            return []  # said by check_tensors
        tensors |= {manifests.tensor_key(folder.name, name): entry for name, entry in own.items()}
        own_formats = quantised_formats(read_json(folder / "config.json"), own)
        formats |= {manifests.tensor_key(folder.name, name): kind for name, kind in own_formats.items()}
    table, found = manifest["tensors"], []
    for name in sorted(tensors.keys() | table.keys()):
        if name not in tensors or name not in table:
            found.append(f"tensor {name} is {'not in the transformer' if name in table else 'not in the manifest'}")
            continue
        stated = table[name]["dtype"], tuple(table[name]["shape"]), table[name]["format"]
        actual = tensors[name].dtype, tensors[name].shape, formats.get(name.rpartition(".")[0], "dense")
        if stated != actual:
            found.append(f"tensor {name} is {actual}, the manifest says {stated}")
    return found


def check_against(manifest: Mapping[str, Any], source: Path) -> list[str]:
    """Every tensor that the manifest calls identical has the same bytes in the ``source`` folder.

    InputError when ``source`` holds no transformer weights, or those of another model.
    """
    base = {
        manifests.tensor_key(network.name, name): entry
        for network in families.network_folders(source)
        for name, entry in read_weights(network if network.is_dir() else source).items()
    }
    identical = {name: record for name, record in manifest["tensors"].items() if record["origin"] == "identical"}
    if 2 * sum(name in base for name in identical) < len(identical):
        raise InputError(
            f"{source} is another model: it lacks most of the tensors that the bundle has from its base",
            "name the model that the bundle was made from: `dcgen-convert inspect BUNDLE` says which",
        )
    found = []
    for name, record in identical.items():
        if name not in base:
            found.append(f"tensor {name} should be the source's, which has none of that name")
        elif tensor_sha256(base[name]) != record["sha256"]:
            found.append(f"tensor {name} should be the source's and differs from it")
    return found
