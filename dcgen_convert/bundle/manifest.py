"""dcgen_manifest.json: how a bundle was made, and the hash of everything in it. Written last, it marks the bundle as
complete.

Everything but the keys "times" and "hardware" follows from recipe, sources and seeds: two runs on one machine give
the same text.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dcgen_convert import families
from dcgen_convert.bundle import lineage
from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.checkpoint.tensors import tensor_sha256
from dcgen_convert.core import names
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import read_object, understood
from dcgen_convert.families.base import Family
from dcgen_convert.svdquant.forms import formats_of

FILE = names.MANIFEST
INDEX = "model_index.json"
SCHEMA = "dcgen.manifest/1"
PACKAGES = (
    "dcgen-convert",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "safetensors",
    "numpy",
)
BEFORE = "before"  # key of a file's entry: hash and size that it may still have, while another one is written
TIMING = ("seconds", "per_second", "resumed_from")  # endings of metrics that differ from run to run


def prompts_of(manifest: Mapping[str, Any]) -> str | None:
    """What the pictures behind a bundle were drawn from: those of its calibration, or those that it was trained on."""
    recipes = [manifest["recipe"], (manifest.get("conversion") or {}).get("recipe") or {}]
    kinds = ((recipe.get("data") or recipe.get("drawing") or {}).get("prompts") for recipe in recipes)
    return next((kind for kind in kinds if kind), None)


def fps_of(manifest: Mapping[str, Any], family: Family) -> float:
    """Frames a second of the videos that a bundle of ``family`` with this manifest draws; 0: it draws pictures."""
    return float(manifest["defaults"].get("fps", family.fps))


def build(  # noqa: PLR0913  one argument for each section of the manifest
    *,
    recipe: Mapping[str, Any],
    family: str,
    sources: Mapping[str, Mapping[str, Any]],
    autoencoder: Mapping[str, Any],
    defaults: Mapping[str, Any],
    seed: int,
    licence: Mapping[str, Any],
    times: Mapping[str, float],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest before the bundle is written; `layout.write_bundle` adds files, tensors and the layout.

    Args:
        recipe: the resolved recipe as plain data; paths of this machine are cut to their last names.
        family: family name.
        sources: role ("base", "autoencoder", ...) -> `source_record`; the hub repository is added as "repo".
        autoencoder: name, factor, channels, scaling_factor.
        defaults: how to draw: height, width [px], steps, guidance, text_length [tokens].
        seed: the recipe's seed.
        licence: from `bundle.card.licence_of`.
        times: stage -> seconds.
        metrics: whatever the stages measured, by stage; what is a time goes to "times".
    """
    steady, timing = split_timing(metrics)
    return {
        "schema": SCHEMA,
        "family": family,
        "recipe": lineage.without_places(recipe),
        "sources": {role: lineage.published(record) for role, record in sources.items()},
        "autoencoder": lineage.without_places(autoencoder),
        "defaults": dict(defaults),
        "seed": seed,
        "licence": dict(licence),
        "metrics": steady,
        "versions": versions(),
        "hardware": hardware(),
        "times": {**{stage: round(seconds, 3) for stage, seconds in times.items()}, **timing},
    }


def split_timing(metrics: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """(nested metrics without times and rates, these as flat "stage.name" -> value)."""
    steady: dict[str, Any] = {}
    timing: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            steady[key], inner = split_timing(value, f"{prefix}{key}.")
            timing |= inner
        elif str(key).endswith(TIMING):
            timing[f"{prefix}{key}"] = value
        else:
            steady[key] = value
    return steady, timing


def require_bundle(folder: Path) -> None:
    """InputError for a folder that is no diffusers folder; of a run folder it names the bundle."""
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return
    run = folder / names.RECIPE
    if run.is_file():
        made = read_object(run).get("output")
        raise InputError(f"{folder} is a run folder, not a bundle", f"its bundle is {made}")
    raise InputError(
        f"{folder} holds no {INDEX}, so it is not a bundle", "give the folder whose path `convert` printed"
    )


def read(bundle: Path) -> dict[str, Any]:
    """The manifest of a bundle; CheckFailed when there is none (an unfinished bundle) or it has another schema.
    InputError for a folder that is no bundle at all."""
    path = Path(bundle) / FILE
    if not path.is_file():
        require_bundle(bundle)
        raise CheckFailed(
            f"{bundle} has no {FILE}: it is not a finished bundle", "run the conversion again, or resume it"
        )
    manifest = read_object(path)
    if manifest.get("schema") != SCHEMA:
        raise CheckFailed(
            f"{path} has schema {manifest.get('schema')!r}, this version reads {SCHEMA!r}", "update dcgen-convert"
        )
    _require_form(path, manifest)
    return manifest


def sources_of(source: Path) -> dict[str, Any]:
    """The sources of a ``source`` that is a bundle, under the names of their roles; empty for every other folder."""
    made = read(source)["sources"] if (source / FILE).is_file() else {}
    return {f"{role} of the source": record for role, record in made.items()}


def _require_form(path: Path, manifest: Mapping[str, Any]) -> None:
    """InputError when a manifest lacks what every one has, or has it in another form."""
    with understood(path, "copy or convert the bundle again"):
        for table in ("sources", "defaults", "metrics", "times", "recipe", "versions"):
            dict(manifest[table])
        for name, record in manifest["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name} is no file of the bundle")
            _ = str(record["sha256"]), int(record["bytes"])
        for record in manifest["tensors"].values():
            _ = str(record["dtype"]), tuple(record["shape"]), str(record["format"]), str(record["origin"])
        for record in manifest["sources"].values():
            dict(record)


def file_table(root: Path, hashes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Relative path -> sha256 and size in bytes."""
    return {name: {"sha256": digest, "bytes": (root / name).stat().st_size} for name, digest in sorted(hashes.items())}


def tensor_key(network: str, name: str) -> str:
    """Key in the table of the tensor ``name`` of a network: its name, for a further network behind the network's."""
    return name if network in families.COMPONENTS else f"{network}/{name}"


def tensor_table(transformer: Path, source: Path, console: Console) -> dict[str, dict[str, Any]]:
    """Every tensor of the bundle's transformer: dtype, shape, format, sha256, and what became of it.

    format: "dense", or that of its linear: "nvfp4", "int4", "awq". origin: "identical" (byte for byte the source's
    tensor of that name), "changed" (the source has one of that name), "new" (it has none).
    """
    base, formats = read_weights(source), formats_of(transformer)
    ours, table = read_weights(transformer), {}
    with console.progress("hash tensors", len(ours), "tensor") as bar:
        for name, info in sorted(ours.items()):
            digest, twin = tensor_sha256(info), base.get(name)
            if twin is None:
                origin = "new"
            elif (twin.dtype, twin.shape) == (info.dtype, info.shape) and tensor_sha256(twin) == digest:
                origin = "identical"
            else:
                origin = "changed"
            table[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "format": formats.get(name.rpartition(".")[0], "dense"),
                "origin": origin,
                "sha256": digest,
            }
            bar.advance()
    return table


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that shape the result; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in GiB, and GPUs of this machine."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform != "win32" else 0
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
