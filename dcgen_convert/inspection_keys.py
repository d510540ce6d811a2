"""What a single-file checkpoint is, from its tensor names and shapes alone (diffusers' and the original key names). First rule that hits
wins."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dcgen_convert import families
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
    """(family, layout) from tensor names; the first family that finds all its names wins. (None, None) when none does."""
    keys = list(names)
    for family in families.FAMILIES.values():
        for layout, wanted in family.layouts.items():
            if all(any(key.startswith(want) for key in keys) for want in wanted):
                return family.name, layout
    return None, None


def _count(tensors: dict, blocks: str) -> int:
    found = [int(match[1]) for name in tensors if (match := re.match(rf"{blocks}\.(\d+)\.", name))]
    return 1 + max(found, default=-1)
