"""The classic nunchaku single file for FLUX.1 (nunchaku's file format), derived from a quantised diffusers folder.

The file stores q, k and v as one layer, which needs one smoothing and one down projection: quantise with
`QuantSettings(fuse_qkv=True)`. The proj_out of a single block is cut along its input channels. Modulation rows are
interleaved, and 1 is added to the bias of the scale rows. In int4 the second bias of an MLP takes in the shift that the
kernel adds after GELU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.checkpoint.tensors import read_tensor
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.svdquant.awq import AwqLinear
from dcgen_convert.svdquant.layer import SvdqLinear
from dcgen_convert.svdquant.runtime import UnpackedLayer, open_layers
from dcgen_convert.svdquant.shards import write_tensors
from dcgen_convert.svdquant.tensors import HALF, pack_awq, pack_svdq
from dcgen_convert.svdquant.weights import QuantWeight

GELU_SHIFT = 0.171875  # added by the fused int4 kernel after GELU, so that its codes can be unsigned
SUFFIXES = {"smooth_factor": "smooth", "proj_down": "lora_down", "proj_up": "lora_up"}

# classic name -> the diffusers linears whose rows it stacks
DOUBLE = {
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_proj_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "out_proj": ("attn.to_out.0",),
    "out_proj_context": ("attn.to_add_out",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
    "mlp_context_fc1": ("ff_context.net.0.proj",),
    "mlp_context_fc2": ("ff_context.net.2",),
}
SINGLE = {"qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"), "mlp_fc1": ("proj_mlp",)}
MODULATION = {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3}  # classic and diffusers name -> splits
NORMS = {"attn.norm_q": "norm_q", "attn.norm_k": "norm_k"} | {
    "attn.norm_added_q": "norm_added_q",
    "attn.norm_added_k": "norm_added_k",
}


def export_nunchaku(folder: Path, file: Path, patch: int) -> None:
    """Write `file` from `folder`, a FluxTransformer2DModel folder as `quantize` writes it.

    patch: latent patch size, 2 for stock FLUX.1 and 1 for a deep-compression autoencoder; ComfyUI's config needs it.
    Errors: InputError for another model class, for a layer that is not quantised, and for q, k and v that were
    quantised apart.
    """
    _, entries, layers = open_layers(folder)
    config = read_json(folder / "config.json")
    if config["_class_name"] != "FluxTransformer2DModel":
        raise InputError(
            f"The classic container is written for FLUX.1 only, not for {config['_class_name']}.",
            "Use --container diffusers.",
        )
    quantisation = config.pop("quantization_config")
    tensors: dict[str, torch.Tensor] = {}
    for index in range(config["num_layers"]):
        _block(f"transformer_blocks.{index}", DOUBLE, layers, tensors)
    for index in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{index}"
        _block(block, SINGLE, layers, tensors)
        _proj_out(block, _svdq(layers, f"{block}.proj_out"), _width(config), tensors)
    tensors |= {_dense_name(name): read_tensor(entry) for name, entry in entries.items()}
    write_tensors(file, tensors, _metadata(config, quantisation, patch))


def _block(
    block: str, names: dict[str, tuple[str, ...]], layers: Mapping[str, UnpackedLayer], tensors: dict[str, torch.Tensor]
) -> None:
    for classic, parts in names.items():
        fused = _stack(block, classic, [_svdq(layers, f"{block}.{part}") for part in parts])
        _add(tensors, f"{block}.{classic}", _fold_shift(fused) if classic.endswith("fc2") else fused)
    for name, splits in MODULATION.items():
        layer = layers.get(f"{block}.{name}")
        if isinstance(layer, AwqLinear):
            packed = pack_awq(_interleave(layer, splits))
            tensors |= {f"{block}.{name}.{part}": tensor for part, tensor in packed.items()}


def _svdq(layers: Mapping[str, UnpackedLayer], name: str) -> SvdqLinear:
    layer = layers.get(name)
    if not isinstance(layer, tuple):
        raise InputError(f"The classic container needs {name} as W4A4, which it is not.", "Quantise all block linears.")
    return layer[0]


def _stack(block: str, classic: str, parts: list[SvdqLinear]) -> SvdqLinear:
    """Layers on the same input as one, rows one after the other."""
    first, weights = parts[0], [part.quantised for part in parts]
    for part in parts[1:]:
        same = torch.equal(part.smooth, first.smooth) and torch.equal(part.down, first.down)
        if not same or part.quantised.tensor_scale != first.quantised.tensor_scale:
            raise InputError(
                f"{block}.{classic} cannot be fused: its layers were quantised apart, each with its own smoothing.",
                "Quantise with --fuse-qkv (in a recipe: quantize.fuse_qkv: true).",
            )
    weight = QuantWeight(
        torch.cat([w.grid for w in weights]),
        torch.cat([w.micro for w in weights]),
        weights[0].tensor_scale,
        weights[0].precision,
    )
    bias = torch.cat([_bias(part) for part in parts])
    return SvdqLinear(weight, first.smooth, torch.cat([part.up for part in parts]), first.down, bias)


def _proj_out(block: str, layer: SvdqLinear, width: int, tensors: dict[str, torch.Tensor]) -> None:
    """proj_out reads [attention, MLP]. The classic file has one layer for each of the two; the MLP's keeps the bias."""
    weight = layer.quantised
    group = weight.grid.shape[1] // weight.micro.shape[1]
    for classic, columns in (("out_proj", slice(0, width)), ("mlp_fc2", slice(width, None))):
        groups = slice(columns.start // group, columns.stop and columns.stop // group)
        part = QuantWeight(weight.grid[:, columns], weight.micro[:, groups], weight.tensor_scale, weight.precision)
        bias = torch.zeros_like(_bias(layer)) if classic == "out_proj" else _bias(layer)
        cut = SvdqLinear(part, layer.smooth[columns], layer.up, layer.down[:, columns], bias)
        _add(tensors, f"{block}.{classic}", _fold_shift(cut) if classic == "mlp_fc2" else cut)


def _fold_shift(layer: SvdqLinear) -> SvdqLinear:
    """int4: bias - R diag(1/s) c, because the fused kernel shifts the input by c; nvfp4 has no shift."""
    if layer.quantised.precision == "nvfp4":
        return layer
    constant = (layer.quantised.dequantise() / layer.smooth).sum(1) * GELU_SHIFT
    return SvdqLinear(layer.quantised, layer.smooth, layer.up, layer.down, (_bias(layer).float() - constant).to(HALF))


def _interleave(layer: AwqLinear, splits: int) -> AwqLinear:
    """Rows from [split, channel] to [channel, split]; 1 is added to the bias of the scale rows (1 and splits - 2)."""

    def reorder(x: torch.Tensor) -> torch.Tensor:
        return x.view(splits, -1, *x.shape[1:]).transpose(0, 1).reshape(x.shape)

    bias = (_zeros(layer.codes) if layer.bias is None else layer.bias).float().view(splits, -1).clone()
    for row in {1, splits - 2}:
        bias[row] += 1
    return AwqLinear(reorder(layer.codes), reorder(layer.scales), reorder(layer.zeros), reorder(bias.view(-1)).to(HALF))


def _bias(layer: SvdqLinear) -> torch.Tensor:
    return _zeros(layer.up) if layer.bias is None else layer.bias


def _zeros(weight: torch.Tensor) -> torch.Tensor:
    """A bias of zeros for a weight (N, ...)."""
    return torch.zeros(weight.shape[0], dtype=HALF)


def _add(tensors: dict[str, torch.Tensor], name: str, layer: SvdqLinear) -> None:
    packed = pack_svdq(layer)
    packed.pop("wcscales", None)  # optional here, and all ones
    tensors |= {f"{name}.{SUFFIXES.get(part, part)}": tensor for part, tensor in packed.items()}
    tensors[f"{name}.smooth_orig"] = packed["smooth_factor"].clone()


def _dense_name(name: str) -> str:
    """Attention norms move up to the block; everything else keeps its diffusers name."""
    module, _, part = name.rpartition(".")
    for theirs, classic in NORMS.items():
        if module.endswith(f".{theirs}"):
            return f"{module.removesuffix(theirs)}{classic}.{part}"
    return name


def _width(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _metadata(config: dict[str, Any], quantisation: dict[str, Any], patch: int) -> dict[str, str]:
    """What nunchaku's and ComfyUI's loaders read from the file's header."""
    svdq = quantisation["svdq_w4a4"]
    fp4 = svdq["precision"] == "nvfp4"
    kind = {"dtype": "fp4_e2m1_all" if fp4 else "int4", "group_size": svdq["group_size"]}
    comfy = {
        "model_class": "Flux" if config["guidance_embeds"] else "FluxSchnell",
        "model_config": {
            "image_model": "flux",
            "disable_unet_model_creation": True,
            "in_channels": config["in_channels"] // patch**2,
            "out_channels": (config.get("out_channels") or config["in_channels"]) // patch**2,
            "patch_size": patch,
            "vec_in_dim": config["pooled_projection_dim"],
            "context_in_dim": config["joint_attention_dim"],
            "hidden_size": _width(config),
            "mlp_ratio": 4.0,
            "num_heads": config["num_attention_heads"],
            "depth": config["num_layers"],
            "depth_single_blocks": config["num_single_layers"],
            "axes_dim": list(config["axes_dims_rope"]),
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": config["guidance_embeds"],
        },
    }
    return {
        "config": json.dumps(config),
        "comfy_config": json.dumps(comfy),
        "model_class": "NunchakuFluxTransformer2dModel",
        "quantization_config": json.dumps(
            {
                "method": "svdquant",
                "weight": kind | {"scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None},
                "activation": kind | {"scale_dtype": "fp8_e4m3_nan" if fp4 else None},
                "rank": svdq["rank"],
            }
        ),
    }
