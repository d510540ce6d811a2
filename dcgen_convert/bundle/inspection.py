"""`inspect`: what a checkpoint, folder or bundle is, from JSON files and safetensors headers only. No weights, no
torch."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from dcgen_convert import families
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.bundle.manifest import FILE as MANIFEST
from dcgen_convert.bundle.manifest import tensor_key
from dcgen_convert.checkpoint import lora
from dcgen_convert.checkpoint.headers import PICKLES, Entry, read_header, read_weights
from dcgen_convert.checkpoint.held import PREFIXES
from dcgen_convert.checkpoint.single import read_single
from dcgen_convert.core import names
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import understood
from dcgen_convert.families import authors, bases, catalog, grid, refused
from dcgen_convert.families.keys import recognise_keys
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.svdquant.forms import BFL, quantised_formats

SIZES = (
    "in_channels",
    "out_channels",
    "patch_size",
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
)

MODULAR = "modular_model_index.json"  # of a pipeline that is not a DiffusionPipeline
FOREIGN = "comfyui"  # quantised by ComfyUI's own tools
# What only other kinds of low-rank updates have in their tensors' names -> what they are.
OTHER_UPDATES = {
    "lokr_w": "LoKr (LyCORIS)",
    "hada_w": "LoHa (LyCORIS)",
    "oft_blocks": "OFT (LyCORIS)",
    "oft_diag": "OFT (LyCORIS)",
}


def inspect(path: Path) -> dict[str, Any]:
    """What `path` is: kind, family, sizes, autoencoder, LoRA, quantisation per layer, licences, GPUs that can run it.

    Raises:
        InputError: nothing there, a pickle, a damaged header, a file longer or shorter than its header says.
    """
    path = Path(path).expanduser()
    if path.suffix in PICKLES:
        raise InputError(
            f"{path} is a pickle checkpoint, which is refused because loading it runs code",
            "convert it to safetensors first",
        )
    if not path.exists():
        known = catalog.find_source(str(path)) is not None
        hint = f"dcgen-convert plan {path} says what this name stands for" if known else "check the path"
        raise InputError(f"no such file or folder: {path}", hint)
    if (path / names.RECIPE).is_file():
        manifests.require_bundle(path)
    found = _file(path) if path.is_file() else _folder(path)
    found["runs_on"] = _runs_on(found)
    return {"path": str(path), **found}


def _file(path: Path) -> dict[str, Any]:
    """A transformer in one file, a LoRA, an autoencoder, or a packed checkpoint."""
    if path.suffix == ".gguf":
        return {"kind": "checkpoint", **_transformer(path), "licences": {}}
    tensors, metadata = read_header(path)
    updates = sum(bool(lora.DOWN.search(name)) for name in tensors)
    bare = [name.removeprefix(prefix) for name in tensors for prefix in PREFIXES if name.startswith(prefix)] or list(
        tensors
    )
    family, layout = recognise_keys(bare)
    deep = any(".op_list" in name or "to_qkv_multiscale" in name for name in tensors)
    weights = _weights(tensors, {})
    other = next((words for part, words in OTHER_UPDATES.items() if any(part in name for name in tensors)), None)
    kind = "lora" if updates or other else "checkpoint" if family else "autoencoder" if deep else "unknown"
    facts: dict[str, Any] = {
        "kind": kind,
        "family": family,
        "layout": layout,
        "metadata": metadata,
        "lora_linears": updates,
    }
    if kind == "checkpoint":
        try:
            facts |= _transformer(path)
        except InputError as error:
            facts["notes"] = [f"convert refuses it: {error.message}"]
    if other:
        facts["notes"] = [f"{other}: convert cannot fuse it, only plain LoRA"]
    return {**facts, "licences": {}, **weights}


def _transformer(path: Path) -> dict[str, Any]:
    """Family, layout and sizes of a transformer alone, what it is completed with, and what its format has lost."""
    single = read_single(path)
    notes = single.contents.losses()
    notes += [f"{count} tensors of {kind} are left aside" for kind, count in single.contents.aside.items()]
    found = {
        "family": single.family.name,
        "layout": single.layout,
        "notes": notes,
        "tensors": len(single.contents.tensors),
    }
    if bases.template_of(single.family.name):
        config = single.config()
        base = bases.base_of(single.family.name, config)
        found |= {
            "sizes": {key: config[key] for key in SIZES if config.get(key) is not None},
            "base": base and base.repo,
        }
    return found


def _folder(path: Path) -> dict[str, Any]:
    """A pipeline folder (model_index.json), a bundle (with its manifest), or one component's folder (config.json)."""
    source, manifest = Identity(str(path.absolute())), path / MANIFEST
    index = source.index or source.reader.optional(path / MODULAR)
    home = path if index is None else families.network_folder(path)
    config = source.reader.first(home / "config.json")
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise InputError(f"{home / 'config.json'} has a damaged quantization_config", "fetch the checkpoint again")
    known = families.recognise(config, source.index)
    tensors, further = read_weights(home), known.further if known and source.index is not None else ()
    networks = {home.name: tensors, **{name: read_weights(path / name) for name in further}}
    tensors = tensors | {tensor_key(name, key): one for name in further for key, one in networks[name].items()}
    found: dict[str, Any] = {
        "kind": "bundle" if manifest.is_file() else "component" if index is None else "pipeline",
        "family": known.name if known else None,
        "class": config.get("_class_name"),
        "pipeline": index.get("_class_name") if index is not None else None,
        "experimental": (known and known.experimental) or None,
        "sizes": {key: config[key] for key in SIZES if config.get(key) is not None},
        "licences": _licences(path),
        "lora_files": sorted(file.name for file in path.glob("*lora*.safetensors")),
        **({"networks": {name: _counts(own) for name, own in networks.items()}} if further else {}),
        **_weights(tensors, config),
    }
    if source.index is not None and authors.is_theirs(source.index, known):
        found["pipeline"] = authors.pipeline_class(source.index)
        how = f"dcgen-convert adopt {path} -o BUNDLE makes a bundle of it"
        found["notes"] = [f"the layout of the DC-Gen authors, which no stock pipeline draws with: {how}"]
    if refusal := refused.refusal_of(config, index):
        found["notes"] = [f"convert refuses it: {refusal.name} cannot be converted: {refusal.why}"]
    if (vae := source.vae) is not None:
        (f, c), time = grid.autoencoder_grid(vae), grid.autoencoder_time(vae)
        found["autoencoder"] = {
            "class": vae.get("_class_name"),
            "f": f,
            "c": c,
            **({} if time == grid.STILL else {"frames": time.frames}),
            "scaling_factor": vae.get("scaling_factor"),
        }
    if manifest.is_file():
        made = source.reader.document(manifest)
        with understood(manifest):
            records = dict(made.get("sources", {}))
            found["made_from"] = {role: record.get("name") or record.get("repo") for role, record in records.items()}
            found["defaults"] = dict(made.get("defaults", {}))
    return found


def _weights(tensors: dict[str, Entry], config: dict[str, Any]) -> dict[str, Any]:
    """Tensors, bytes by dtype, and the format of every quantised linear: as the config says, else by its tensors."""
    sizes: Counter[str] = Counter()
    for item in tensors.values():
        sizes[item.dtype] += item.end - item.start
    layers = quantised_formats(config, tensors) or packed_layers(tensors)
    foreign = {} if layers else foreign_layers(tensors)
    stated = (config.get("quantization_config") or {}).get("quant_method")
    method = stated or ("svdquant" if layers else FOREIGN if foreign else None)
    layers = layers or foreign
    counts = dict(Counter(layers.values()))
    quantisation = {"method": method, "counts": counts, "layers": layers} if method else None
    return {**_counts(tensors), "dtypes": dict(sizes), "quantisation": quantisation}


def _counts(tensors: dict[str, Entry]) -> dict[str, int]:
    return {"tensors": len(tensors), "bytes": sum(item.end - item.start for item in tensors.values())}


def packed_layers(tensors: dict[str, Entry]) -> dict[str, str]:
    """Module -> format by tensors alone (nunchaku's file format): `qweight` with `wzeros` is AWQ; FP8 `wscales` mean
    NVFP4.
    """
    found = {}
    for name in tensors:
        module, dot, leaf = name.rpartition(".")
        if dot and leaf == "qweight":
            scales = tensors.get(f"{module}.wscales")
            nvfp4 = scales is not None and scales.dtype == "F8_E4M3"
            found[module] = "awq" if f"{module}.wzeros" in tensors else "nvfp4" if nvfp4 else "int4"
    return found


def foreign_layers(tensors: dict[str, Entry]) -> dict[str, str]:
    """Module -> format, of linears that ComfyUI has packed: NVFP4 has a second scale, int8 a scale beside integers."""
    found = {}
    for name, entry in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_scale_2":
            found[module] = "nvfp4"
        elif leaf == "weight" and entry.dtype == "I8":
            found[module] = "int8"
    return found


def _licences(path: Path) -> dict[str, str]:
    """Licence fields that the folder itself declares: model card front matter, and licence files by first line."""
    found = {}
    card = path / "README.md"
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    if text.startswith("---"):
        front = text.split("---")[1]
        for key, value in re.findall(r"^(license\w*):\s*(.+)$", front, re.MULTILINE):
            found[key] = value.strip()
    for file in sorted(path.glob("LICENSE*")):
        lines = [
            line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        found[file.name] = lines[0] if lines else "(empty)"
    return found


def _runs_on(found: dict[str, Any]) -> str:
    """Which GPUs run it natively (nunchaku's file format: what the kernels are compiled for)."""
    quantisation = found.get("quantisation") or {}
    counts = quantisation.get("counts", {})
    if quantisation.get("method") == FOREIGN:
        formats = " and ".join(sorted(counts))
        return f"ComfyUI, on a GPU with {formats} kernels; diffusers and dcgen-convert need the dense model"
    elsewhere = "; elsewhere `dcgen-convert sample` draws through the dequantised reference"
    if quantisation.get("method") == BFL:
        return (
            "NVFP4 kernels of FlashInfer: Blackwell (compute capability 10.0 and above); elsewhere diffusers and "
            "`dcgen-convert sample` draw with dequantised weights"
        )
    if "nvfp4" in counts:
        return "NVFP4 kernels: RTX 50 / RTX PRO Blackwell and GB10 (compute capability 12.x)" + elsewhere
    if "int4" in counts:
        return "INT4 kernels: Turing, Ampere, Ada (compute capability 7.5, 8.x) and 12.x, not Hopper" + elsewhere
    return "any device that diffusers runs on"


def render(found: dict[str, Any]) -> str:
    """The document of `inspect` as lines of text; layers are counted, not listed."""
    lines = []
    for key, value in found.items():
        if key in ("schema", "status"):
            continue
        if key == "quantisation" and value:
            counts = ", ".join(f"{count} {kind}" for kind, count in value["counts"].items())
            lines.append(f"quantisation: {value['method']}: {counts or 'no packed layer found'}")
        elif key == "bytes":
            lines.append(f"bytes: {value:,}")
        elif key == "networks":
            each = (f"{name} {own['tensors']} tensors, {own['bytes']:,} bytes" for name, own in value.items())
            lines.append(f"networks: {'; '.join(each)}")
        elif isinstance(value, dict) and value:
            lines.append(f"{key}: " + ", ".join(f"{name} {one}" for name, one in value.items() if one is not None))
        elif value not in (None, {}, [], 0):
            lines.append(f"{key}: {value}")
    return "\n".join(lines)
