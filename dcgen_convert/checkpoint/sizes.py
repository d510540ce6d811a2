"""The sizes of a transformer's config, read off the shapes of its tensors in diffusers' names.

What no shape tells (rotary axes, norm epsilons, time scales) comes from a template: the base's own config, else the one
that ships in `families/configs/`. So a model of unusual width or depth is described as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.families import Family

Shape = tuple[int, ...]


class TensorShapes:
    """TensorShapes by name, with the questions that the families ask."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes

    def rows(self, name: str) -> int:
        return self.axis(name, 0)

    def columns(self, name: str) -> int:
        return self.axis(name, 1)

    def axis(self, name: str, axis: int) -> int:
        shape = self.shapes.get(name, ())
        if len(shape) <= axis or not shape[axis]:
            raise InputError(f"the checkpoint lacks {name}, which its sizes are read from", "is it complete?")
        return shape[axis]

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)

    def count(self, blocks: str) -> int:
        """Blocks of a list, by the highest number."""
        pattern = re.compile(rf"{re.escape(blocks)}\.(\d{{1,4}})\.")
        return 1 + max((int(match[1]) for name in self.shapes if (match := pattern.match(name))), default=-1)


def _heads(t: TensorShapes, width: str, head: str) -> dict:
    dim = t.rows(head)
    return {"attention_head_dim": dim, "num_attention_heads": t.rows(width) // dim}


def _two_streams(t: TensorShapes) -> dict:
    """What FLUX.1, FLUX.2 and Chroma have in common."""
    return {
        "in_channels": t.columns("x_embedder.weight"),
        "out_channels": t.rows("proj_out.weight"),
        "num_layers": t.count("transformer_blocks"),
        "num_single_layers": t.count("single_transformer_blocks"),
        **_heads(t, "x_embedder.weight", "transformer_blocks.0.attn.norm_k.weight"),
        "joint_attention_dim": t.columns("context_embedder.weight"),
    }


def flux(t: TensorShapes) -> dict:
    return {
        **_two_streams(t),
        "pooled_projection_dim": t.columns("time_text_embed.text_embedder.linear_1.weight"),
        "guidance_embeds": t.has("time_text_embed.guidance_embedder."),
    }


def chroma(t: TensorShapes) -> dict:
    return {
        **_two_streams(t),
        "approximator_num_channels": t.columns("distilled_guidance_layer.in_proj.weight"),
        "approximator_hidden_dim": t.rows("distilled_guidance_layer.in_proj.weight"),
        "approximator_layers": t.count("distilled_guidance_layer.layers"),
    }


def flux2(t: TensorShapes) -> dict:
    return {
        **_two_streams(t),
        "timestep_guidance_channels": t.columns("time_guidance_embed.timestep_embedder.linear_1.weight"),
        "mlp_ratio": t.columns("transformer_blocks.0.ff.linear_out.weight") / t.rows("x_embedder.weight"),
        "guidance_embeds": t.has("time_guidance_embed.guidance_embedder."),
    }


def sd3(t: TensorShapes) -> dict:
    depth, width = t.count("transformer_blocks"), t.rows("pos_embed.proj.weight")
    dual = [i for i in range(depth) if t.has(f"transformer_blocks.{i}.attn2.")]
    normed = t.has("transformer_blocks.0.attn.norm_q.")
    patch = t.axis("pos_embed.proj.weight", 2)
    found = {
        "patch_size": patch,
        "in_channels": t.columns("pos_embed.proj.weight"),
        "out_channels": t.rows("proj_out.weight") // patch**2,
        "num_layers": depth,
        "joint_attention_dim": t.columns("context_embedder.weight"),
        "caption_projection_dim": t.rows("context_embedder.weight"),
        "pooled_projection_dim": t.columns("time_text_embed.text_embedder.linear_1.weight"),
        "pos_embed_max_size": math.isqrt(t.columns("pos_embed.pos_embed")),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if normed else None,
    }
    if normed:
        return found | _heads(t, "pos_embed.proj.weight", "transformer_blocks.0.attn.norm_q.weight")
    return found | {
        "num_attention_heads": depth,
        "attention_head_dim": width // max(depth, 1),
    }  # SD3 medium: 24 blocks, 24 heads


def sana(t: TensorShapes) -> dict:
    patch = t.axis("patch_embed.proj.weight", 2)
    hidden = t.rows("transformer_blocks.0.ff.conv_inverted.weight") / 2
    return {
        "patch_size": patch,
        "in_channels": t.columns("patch_embed.proj.weight"),
        "out_channels": t.rows("proj_out.weight") // patch**2,
        "num_layers": t.count("transformer_blocks"),
        "cross_attention_dim": t.rows("transformer_blocks.0.attn2.to_q.weight"),
        "caption_channels": t.columns("caption_projection.linear_1.weight"),
        "mlp_ratio": hidden / t.rows("patch_embed.proj.weight"),
        "qk_norm": "rms_norm_across_heads"
        if t.has("transformer_blocks.0.attn1.norm_q.")
        else None,  # SANA-1.5 and Sprint
        "guidance_embeds": t.has("time_embed.guidance_embedder."),
        "width": t.rows("patch_embed.proj.weight"),
    }


def lumina2(t: TensorShapes) -> dict:
    width, head = t.rows("x_embedder.weight"), t.rows("layers.0.attn.norm_k.weight")
    return {
        "hidden_size": width,
        "num_layers": t.count("layers"),
        "num_refiner_layers": t.count("noise_refiner"),
        "num_attention_heads": width // head,
        "num_kv_heads": t.rows("layers.0.attn.to_k.weight") // head,
        "cap_feat_dim": t.rows("time_caption_embed.caption_embedder.0.weight"),
    }


def zimage(t: TensorShapes) -> dict:
    width = t.rows("all_x_embedder.2-1.weight")
    head = t.rows("layers.0.attention.norm_k.weight")
    return {
        "in_channels": t.columns("all_x_embedder.2-1.weight") // 4,
        "dim": width,
        "n_layers": t.count("layers"),
        "n_refiner_layers": t.count("noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": t.rows("layers.0.attention.to_k.weight") // head,
        "cap_feat_dim": t.rows("cap_embedder.0.weight"),
    }


def qwenimage(t: TensorShapes) -> dict:
    return {
        "in_channels": t.columns("img_in.weight"),
        "num_layers": t.count("transformer_blocks"),
        **_heads(t, "img_in.weight", "transformer_blocks.0.attn.norm_k.weight"),
        "joint_attention_dim": t.columns("txt_in.weight"),
    }


def auraflow(t: TensorShapes) -> dict:
    width = t.rows("pos_embed.proj.weight")
    return {
        "num_mmdit_layers": t.count("joint_transformer_blocks"),
        "num_single_dit_layers": t.count("single_transformer_blocks"),
        "joint_attention_dim": t.columns("context_embedder.weight"),
        "caption_projection_dim": t.rows("context_embedder.weight"),
        "pos_embed_max_size": t.columns("pos_embed.pos_embed"),
        "width": width,
    }


def krea2(t: TensorShapes) -> dict:
    head, text = (
        t.rows("transformer_blocks.0.attn.norm_k.weight"),
        t.rows("text_fusion.refiner_blocks.0.attn.norm_k.weight"),
    )
    return {
        "in_channels": t.columns("img_in.weight"),
        "num_layers": t.count("transformer_blocks"),
        **_heads(t, "img_in.weight", "transformer_blocks.0.attn.norm_k.weight"),
        "num_key_value_heads": t.rows("transformer_blocks.0.attn.to_k.weight") // head,
        "intermediate_size": t.rows("transformer_blocks.0.ff.up.weight"),
        "timestep_embed_dim": t.columns("time_embed.linear_1.weight"),
        "text_hidden_dim": t.columns("txt_in.linear_1.weight"),
        "num_text_layers": t.columns("text_fusion.projector.weight"),
        "text_num_attention_heads": t.rows("text_fusion.refiner_blocks.0.attn.to_q.weight") // text,
        "text_num_key_value_heads": t.rows("text_fusion.refiner_blocks.0.attn.to_k.weight") // text,
        "text_intermediate_size": t.rows("text_fusion.refiner_blocks.0.ff.up.weight"),
        "num_layerwise_text_blocks": t.count("text_fusion.layerwise_blocks"),
        "num_refiner_text_blocks": t.count("text_fusion.refiner_blocks"),
    }


AXES = ("axes_dims_rope", "axes_dim_rope", "axes_dims")  # rotary axes, which together are as wide as a head
SIZES: dict[str, Callable[[TensorShapes], dict]] = {
    f.__name__: f for f in (flux, chroma, flux2, sd3, sana, lumina2, zimage, qwenimage, auraflow, krea2)
}
SIZES["sana-sprint"] = sana


def config_of(family: Family, shapes: Mapping[str, Shape], template: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a transformer of ``family``: ``template`` with every size that the shapes tell.

    Rotary axes that do not add up to the head's width cannot be told from shapes: they are left out.
    """
    found = SIZES[family.name](TensorShapes(shapes)) if family.name in SIZES else {}
    width = found.pop("width", None)
    config = {**template, **found, "_class_name": family.model_class}
    if width is not None:  # heads do not show in any shape: those of the template, if they make up the width
        head = config.get("attention_head_dim") or 0
        if not head or width % head:
            raise InputError(
                f"the checkpoint is {width} wide, which heads of {head} do not divide",
                "name a pipeline folder with the same heads: --base FOLDER",
            )
        config["num_attention_heads"] = width // head
    cross = config.get("cross_attention_dim")
    if cross and config.get("cross_attention_head_dim"):
        config["num_cross_attention_heads"] = cross // config["cross_attention_head_dim"]
    for key in AXES:
        if key in config and sum(config[key]) != _head_width(config):
            del config[key]
    config.pop("quantization_config", None)
    return config


def _head_width(config: Mapping[str, Any]) -> int:
    if "attention_head_dim" in config:
        return config["attention_head_dim"]
    width, heads = (
        config.get("hidden_size") or config.get("dim"),
        config.get("num_attention_heads") or config.get("n_heads"),
    )
    return width // heads if width and heads else 0
