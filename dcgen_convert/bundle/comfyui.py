"""A bundle as files for ComfyUI: the transformer under its authors' tensor names, and the DC-AE beside it.

    NAME-WEIGHTS.safetensors   for models/diffusion_models. Attention and MLP in the format WEIGHTS, the rest bfloat16
    NAME-dc-ae.safetensors     for models/vae: the autoencoder under diffusers' names, as the bundle holds it

Each has one metadata key, `dcgen`: a JSON document with what the nodes in integrations/comfyui need and no tensor says.
Nothing but a chunk of one tensor is in memory at a time, and for nvfp4 one byte for 16 weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcgen_convert import families
from dcgen_convert.bundle.loading import family_of, is_quantised, transformer_config
from dcgen_convert.bundle.manifest import read as read_manifest
from dcgen_convert.checkpoint import keymap, stream, trust
from dcgen_convert.checkpoint.headers import Entry, read_header, read_weights
from dcgen_convert.checkpoint.held import Contents, Numbers, Part, from_entries, item_of
from dcgen_convert.checkpoint.tensors import same_entries
from dcgen_convert.core import names
from dcgen_convert.core.console import Console
from dcgen_convert.core.disk import check_disk
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object
from dcgen_convert.families.base import Family
from dcgen_convert.families.grid import autoencoder_grid, tile_sizes
from dcgen_convert.families.pixel_memory import TILE, TILED

if TYPE_CHECKING:
    from dcgen_convert.svdquant.comfyui import ComfyLinear

SCHEMA = "dcgen.comfyui/1"
KEY = "dcgen"  # of the metadata
WEIGHTS = ("bf16", "fp8", "nvfp4")
HALF = "BF16"
PLAIN_NVFP4 = (
    "nvfp4 is ComfyUI's plain 4-bit format, without the 16-bit low-rank branch of SVDQuant: expect visible differences "
    "from bf16, and look at pictures before you use it; --weights fp8 is closer"
)


def export(bundle: Path, folder: Path, weights: str, console: Console) -> dict[str, Any]:
    """Write both files into ``folder``; returns what was written, the fields of `Exported`.

    Args:
        bundle: bundle of a conversion, dense.
        folder: created when missing.
        weights: one of WEIGHTS.

    Raises:
        InputError: ComfyUI has no network or no names for the family, or the bundle cannot be written in its names.
        CheckFailed: the bundle is unfinished. ResourceError: the disk is too small.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights {weights!r} do not exist", f"choose one of {', '.join(WEIGHTS)}")
    bundle = bundle.resolve()
    manifest, family, config = read_manifest(bundle), family_of(bundle), transformer_config(bundle)
    table, vae = _key_map(bundle, family), _autoencoder(bundle, family, config)
    contents = from_entries(families.network_folder(bundle), read_weights(families.network_folder(bundle)))
    linears, items = _transformer(family, table, contents, weights)
    decoder = read_weights(bundle / "vae")
    about = {"schema": SCHEMA, "bundle": bundle.name, "latent": _latent(vae), "config": vae}
    transformer = folder / f"{bundle.name}-{weights}.safetensors"
    autoencoder = folder / f"{bundle.name}-dc-ae.safetensors"
    files = {transformer: items}
    if not _is_there(autoencoder, decoder, {KEY: json.dumps(about)}):
        files[autoencoder] = {name: stream.whole(name, entry) for name, entry in decoder.items()}
    for path in files:
        if path.exists():
            raise InputError(f"{path} is there already", "remove it, or choose another folder with --output")
    size = sum(item.size for part in files.values() for item in part.values())
    check_disk([(folder, size)], "--output")
    facts = {
        "schema": SCHEMA,
        "bundle": bundle.name,
        "latent": about["latent"],
        "network": family.comfyui_network(config),
        "shift": _shift(bundle, family),
        "defaults": manifest["defaults"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    with console.progress("export", size, "B") as bar:
        for path, part in reversed(files.items()):  # the transformer last
            stream.write(path, part, {KEY: json.dumps(facts if path == transformer else about)}, bar.advance)
    notes = _notes(contents, weights)
    for note in notes:
        console.warn(note)
    return {
        "bundle": bundle,
        "transformer": transformer,
        "autoencoder": autoencoder,
        "bytes": size,
        "tensors": {"transformer": len(items), "autoencoder": len(decoder)},
        **_measured(linears),
        "notes": notes,
    }


def _measured(linears: list[ComfyLinear]) -> dict[str, Any]:
    """How many linears have each format, and the root of sum (w - Q(w))^2 over sum w^2 in it."""
    formats: dict[str, list[ComfyLinear]] = {}
    for linear in linears:
        formats.setdefault(linear.conf["format"], []).append(linear)
    errors = {
        kind: [sum(one.lost for one in found), sum(one.energy for one in found)] for kind, found in formats.items()
    }
    return {
        "linears": {kind: len(found) for kind, found in formats.items()},
        "weight_error": {kind: math.sqrt(lost / energy) if energy else 0.0 for kind, (lost, energy) in errors.items()},
    }


def _is_there(path: Path, entries: Mapping[str, Entry], metadata: dict[str, str]) -> bool:
    """Whether a file holds these tensors and this metadata already: several exports share the autoencoder."""
    if not path.is_file():
        return False
    found, said = read_header(path)
    return said == metadata and same_entries(found, entries)


def _key_map(bundle: Path, family: Family) -> keymap.KeyMap:
    """The names of the family's authors, which ComfyUI reads; InputError for what it cannot be given."""
    layout = next((name for name in family.layouts if name != "diffusers"), "")
    table = keymap.find(family.name, layout) if family.comfyui else None
    if table is None:
        able = ", ".join(one.name for one in families.FAMILIES.values() if one.comfyui)
        raise InputError(
            f"{bundle} is a {family.name} model, and ComfyUI can be given bundles of {able} only",
            "draw with it in diffusers: dcgen-convert sample, or the lines in its README.md",
        )
    if is_quantised(bundle):
        raise InputError(
            f"{bundle} is quantised to 4 bits, and ComfyUI has no layout for its low-rank branch",
            "export the dense bundle (convert with --quantize none), with --weights fp8 or nvfp4",
        )
    if (bundle / names.LORA).is_file():
        raise InputError(f"{bundle} keeps its LoRA apart from the weights", "convert with --merge-lora, then export")
    return table


def _autoencoder(bundle: Path, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Config of the AutoencoderDC, without what only the bundle's adapter knows; InputError where there is none."""
    import inspect

    from diffusers import AutoencoderDC

    vae = read_object(bundle / "vae" / "config.json")
    if vae.get("_class_name") not in ("AutoencoderDC", trust.ADAPTER_CLASS):
        raise InputError(
            f"{bundle} draws in the latents of a {vae.get('_class_name')}: it is not converted to a DC-AE",
            "give a bundle that `convert` wrote; ComfyUI loads the model as it was by itself",
        )
    if family.patch(config, autoencoder_grid(vae)[1]) != 1:
        raise InputError(f"{bundle} has tokens of several latent cells", "give a bundle that `convert` wrote")
    known = inspect.signature(AutoencoderDC.__init__).parameters
    return {key: value for key, value in vae.items() if key in known}


def _latent(vae: Mapping[str, Any]) -> dict[str, Any]:
    """What the nodes know of the latent: px of a cell, channels, scale, and the tiles of large pictures in px."""
    factor, channels = autoencoder_grid(vae)
    side, stride = tile_sizes(factor, TILE)
    return {
        "factor": factor,
        "channels": channels,
        "scaling_factor": vae["scaling_factor"],
        "tiles": {"above": TILED, "side": side, "stride": stride},
    }


def _shift(bundle: Path, family: Family) -> list[list[float]]:
    """The timestep shift: [[tokens, mu], [tokens, mu]], two points of the line of mu; r = e^mu (`bundle.scheduler`)."""
    scheduler = read_object(bundle / "scheduler" / "scheduler_config.json")
    if scheduler.get("use_dynamic_shifting") and scheduler.get("time_shift_type", "exponential") != "exponential":
        raise InputError(f"the scheduler of {bundle} has a {scheduler['time_shift_type']} shift", "ComfyUI has none")
    ends = (scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096))
    return [[tokens, math.log(family.shift(tokens, scheduler))] for tokens in ends]


def _transformer(
    family: Family, table: keymap.KeyMap, contents: Contents, weights: str
) -> tuple[list[ComfyLinear], dict[str, stream.Item]]:
    """(linears in another format than bfloat16, all tensors of the file)."""
    from dcgen_convert.svdquant.comfyui import FORMATS

    linears: list[ComfyLinear] = []
    items: dict[str, stream.Item] = {}
    for name, stack in table.backward(contents.shapes).items():
        parts: tuple[Part, ...] = tuple((contents.tensors[cut.name], cut.start, cut.stop) for cut in stack.cuts)
        modules = {cut.name.removesuffix(".weight") for cut in stack.cuts if cut.name.endswith(".weight")}
        inside = len(stack.shape) == 2 and all(family.inside_blocks.match(module) for module in modules)
        if weights in FORMATS and modules and inside and not _all_match(family.dense_pattern, modules):
            make = FORMATS[weights][_all_match(family.awq_pattern, modules)]
            linears.append(make(name.removesuffix(".weight"), stack.shape, parts))
            items |= linears[-1].items()
        elif all(held.dtype == HALF for held, _, _ in parts):
            items[name] = item_of(name, stack.shape, list(parts))
        else:
            items[name] = Numbers(HALF, stack.shape, name, parts)
    return linears, items


def _all_match(pattern: str, modules: set[str]) -> bool:
    return all(re.fullmatch(pattern, module) for module in modules)


def _notes(contents: Contents, weights: str) -> list[str]:
    """What a user must know of the weights."""
    wider = sorted({held.dtype for held in contents.tensors.values()} - {HALF})
    found = [f"the bundle's weights are {', '.join(wider)}: they are rounded to bfloat16"] if wider else []
    return found + ([PLAIN_NVFP4] if weights == "nvfp4" else [])
