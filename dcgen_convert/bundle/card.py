"""The model card of a bundle: what it is, the exact lines that run it, how it was made and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from dcgen_convert.checkpoint.licence import FIELDS
from dcgen_convert.families.base import Family
from dcgen_convert.families.grid import tile_sizes

STOCK_TILES = (512, 448)  # px, of diffusers' AutoencoderDC


def render(
    manifest: Mapping[str, Any], *, family: Family, layout: str = "stock", lora: bool = False, title: str
) -> str:
    """README.md of a bundle.

    Args:
        manifest: from `manifest.build`. Nothing that differs between two equal runs (times, hardware) goes into the
            card.
        family: facts of the model's family.
        layout: "stock", "official" or "source".
        lora: whether the bundle keeps its LoRA apart.
        title: heading, usually the bundle's name.
    """
    parts = [
        _front_matter(manifest, family, lora),
        f"# {title}",
        _summary(manifest, layout),
        *([f"Note: {family.experimental}."] if family.experimental else []),
        "## Use",
        _usage(manifest, family, layout, lora),
    ]
    if manifest["metrics"]:
        parts += ["## Measured", _table(_numbers(manifest["metrics"]))]
    parts += ["## Made from", _sources(manifest), "## Licence", _licence(manifest), "## Recipe", _recipe(manifest)]
    return "\n\n".join(parts) + "\n"


def _front_matter(manifest: Mapping[str, Any], family: Family, lora: bool) -> str:
    base = manifest["licence"].get("base", {})
    header: dict[str, Any] = {key: base[key] for key in FIELDS if key in base and base[key] != "unknown"}
    quantised = manifest["recipe"].get("quantize", {}).get("format", "none") != "none"
    # The hub takes repository ids only, and a local path would tell where the converting machine keeps its files.
    models = [record["name"] for record in manifest["sources"].values() if record.get("revision")]
    if models:
        header |= {
            "base_model": models,
            "base_model_relation": "quantized" if quantised else "adapter" if lora else "finetune",
        }
    if "encoder_hidden_states" in family.text_keys:
        header["pipeline_tag"] = "text-to-image"
    header |= {"library_name": "diffusers", "tags": ["dcgen-convert", "dc-ae", family.name]}
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _summary(manifest: Mapping[str, Any], layout: str) -> str:
    ae, base = manifest["autoencoder"], manifest["sources"]["base"]["name"]
    quantised = manifest["recipe"].get("quantize", {}).get("format", "none")
    text = (
        f"`{base}` converted to the deep-compression autoencoder `{ae['name']}` "
        f"(f{ae['factor']}, {ae['channels']} channels, one token per {ae['factor']} x {ae['factor']} px) "
        "with the DC-Gen method (arXiv 2509.25180)."
    )
    if layout == "source":
        text = f"`{base}` in its own latent space; all but the transformer's block linears is as it was."
    if quantised != "none":
        text += (
            f" Its block linears are SVDQuant W4A4 {quantised.upper()} (arXiv 2411.05007), in the "
            "`nunchaku_lite` format of diffusers."
        )
    return text


def _usage(manifest: Mapping[str, Any], family: Family, layout: str, lora: bool) -> str:
    defaults = manifest["defaults"]
    kind = f"DCGen_{family.pipeline_class}" if layout == "official" else "DiffusionPipeline"
    trust = ", trust_remote_code=True" if layout == "stock" and family.bundle_tier == 2 else ""
    lines = [
        f"# {kind} is the DC-Gen authors' class: import it from their repository"
        if layout == "official"
        else f"from diffusers import {kind}"
    ]
    lines += ["import torch", "", f'pipe = {kind}.from_pretrained("PATH", dtype=torch.bfloat16{trust}).to("cuda")']
    if lora:
        lines.append('pipe.load_lora_weights("PATH")')
    lines.append(f"image = pipe({_arguments(defaults, family)}).images[0]")
    text = "```python\n" + "\n".join(lines) + "\n```"
    if trust:
        text += (
            "\n\nThe flag runs `vae/autoencoder_dc_adapter_v*.py` of this repository: about a hundred lines that show "
            "the deep latent to the stock pipeline in the shape that it packs. "
            f"The pipeline, the {family.component} and the scheduler are stock."
        )
    elif tile_sizes(manifest["autoencoder"]["factor"]) != STOCK_TILES:
        tile, stride = tile_sizes(manifest["autoencoder"]["factor"])
        text += (
            f"\n\nTiled decoding needs its sizes here: `pipe.vae.enable_tiling({tile}, {tile}, {stride}, {stride})`."
        )
    if manifest["recipe"].get("quantize", {}).get("format", "none") == "nvfp4":
        text += (
            "\n\nThe NVFP4 kernels need an RTX 50 / RTX PRO Blackwell GPU, `pip install kernels` and "
            "`DIFFUSERS_TRUST_REMOTE_KERNELS=true`. "
            "`dcgen-convert sample` draws on any machine, from dequantised weights."
        )
    if manifest["recipe"].get("quantize", {}).get("container") == "nunchaku":
        text += (
            "\n\n`nunchaku.safetensors` is the same 4-bit transformer in nunchaku's classic container, "
            "for `NunchakuFluxTransformer2dModel.from_pretrained`"
        )
        # ComfyUI's FLUX latents have 16 channels at 1/8 of the size: those of the source, not those of a conversion.
        text += " and ComfyUI-nunchaku." if layout == "source" else ". ComfyUI cannot draw with these latents."
    return text


def _arguments(defaults: Mapping[str, Any], family: Family) -> str:
    """The family's own call of the stock pipeline, as source code."""
    size = {key: defaults[key] for key in ("height", "width", "steps", "guidance")}
    prompt = "207" if "class_labels" in family.text_keys else "a red fox in the snow"
    call = family.pipeline_call(None, [prompt], **size, length=defaults["text_length"])
    if "prompt" in call:
        call["prompt"] = prompt
    return ", ".join(f"{key}={value!r}" for key, value in call.items())  # by name: FLUX.2's first argument is an image


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, int | float]]:
    """Numbers of nested metrics as (dotted name, value); lists and texts are in the manifest."""
    rows: list[tuple[str, int | float]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows.append((prefix + key, value))
    return rows


def _table(rows: list[tuple[str, int | float]]) -> str:
    cells = [f"| {name} | {f'{value:.5g}' if isinstance(value, float) else value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *cells])


def _sources(manifest: Mapping[str, Any]) -> str:
    lines = []
    for role, record in sorted(manifest["sources"].items()):
        revision = f", revision `{record['revision']}`" if record.get("revision") else ""
        lines.append(f"- {role}: `{record['name']}`{revision}")
    return "\n".join([*lines, "", "Hashes of every file, versions and seeds: `dcgen_manifest.json`."])


def _licence(manifest: Mapping[str, Any]) -> str:
    lines = []
    for role, stated in sorted(manifest["licence"].items()):
        name = " ".join(str(stated[key]) for key in FIELDS if key in stated)
        files = f" (files: {', '.join(stated['files'])})" if stated.get("files") else ""
        lines.append(f"- {role}: {name}{files}")
    unknown = any(stated.get("license") == "unknown" for stated in manifest["licence"].values())
    note = "Inherited from the sources." + (
        " Where it says unknown, the source states no licence: ask its authors before use." if unknown else ""
    )
    return "\n".join([*lines, "", note])


def _recipe(manifest: Mapping[str, Any]) -> str:
    return "```yaml\n" + yaml.safe_dump(dict(manifest["recipe"]), sort_keys=False, allow_unicode=True) + "```"
