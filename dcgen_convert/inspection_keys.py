"""What a single-file checkpoint is, from its tensor names and shapes alone (diffusers' and the original key names). First rule that hits
wins."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dcgen_convert.checkpoint.headers import read_header
from dcgen_convert.errors import InputError

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")


def config_from_header(path: Path) -> dict:
    """The transformer config of a single-file FLUX.1 checkpoint, from its tensor names and shapes; other classes
    need a folder.

    Raises:
        InputError: a layout that does not carry its sizes.
    """
    tensors = {strip(name): item.shape for name, item in read_header(path)[0].items()}
    family, layout = recognise_keys(tensors)
    if family != "flux":
        known = f"a {family} checkpoint" if family else "no checkpoint of a supported family"
        raise InputError(
            f"{path} is {known}, whose config a single file does not carry", "give the diffusers folder, or its hub id"
        )
    doubles, singles, first, text, pooled, head_norm, guidance = _FLUX_KEYS[layout]
    head = tensors[head_norm][0]
    width = tensors[first][0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": head,
        "axes_dims_rope": [16, 56, 56] if head == 128 else None,
        "guidance_embeds": any(guidance in name for name in tensors),
        "in_channels": tensors[first][1],
        "joint_attention_dim": tensors[text][1],
        "num_attention_heads": width // head,
        "num_layers": _count(tensors, doubles),
        "num_single_layers": _count(tensors, singles),
        "patch_size": 1,
        "pooled_projection_dim": tensors[pooled][1],
    }


_FLUX_KEYS = {
    "bfl": ("double_blocks", "single_blocks", "img_in.weight", "txt_in.weight", "vector_in.in_layer.weight",
            "double_blocks.0.img_attn.norm.key_norm.scale", "guidance_in."),
    "diffusers": ("transformer_blocks", "single_transformer_blocks", "x_embedder.weight", "context_embedder.weight",
                  "time_text_embed.text_embedder.linear_1.weight", "transformer_blocks.0.attn.norm_k.weight",
                  "guidance_embedder."),
}  # fmt: skip


def strip(name: str) -> str:
    """A tensor name without the prefixes that other tools put before it."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def recognise_keys(names: Iterable[str]) -> tuple[str | None, str | None]:
    """(family, layout) from tensor names; the first rule that hits wins. (None, None) when nothing does."""
    keys = set(names)

    def has(*wanted: str) -> bool:
        return all(any(key == want or key.startswith(want) for key in keys) for want in wanted)

    if has("single_stream_modulation") or has("distilled_guidance_layer"):
        return None, None  # FLUX.2 and Chroma share names with FLUX.1
    if has("double_blocks.0.img_attn.norm.key_norm.scale", "vector_in."):
        return "flux", "bfl"
    if has("single_transformer_blocks.0.proj_mlp.", "time_text_embed.text_embedder"):
        return "flux", "diffusers"
    if has("caption_norm.", "patch_embed.proj.", "transformer_blocks.0.ff.conv_depth."):
        return "sana", "diffusers"
    if has("attention_y_norm.", "blocks.0.cross_attn.q_linear."):
        return "sana", "original"
    if has("proj_out_1.", "proj_out_2."):
        return "dit", "diffusers"
    if has("y_embedder.embedding_table"):
        return "dit", "original"
    return None, None


def _count(tensors: dict, blocks: str) -> int:
    found = [int(match[1]) for name in tensors if (match := re.match(rf"{blocks}\.(\d+)\.", name))]
    return 1 + max(found, default=-1)
