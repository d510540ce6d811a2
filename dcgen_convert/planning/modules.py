"""The structure of a transformer, read from its class on the meta device: for classes that `layers` does not compute.

Parameter counts are exact. FLOPs are estimates, because only a layer's name tells what the layer is applied to. Needs
torch and diffusers.
"""

from __future__ import annotations

import re
from typing import Any

from dcgen_convert.families import Family
from dcgen_convert.planning.layers import Layer, Structure

TEXT = re.compile(
    r"(^|.*\.)(add_[qkv]_proj|to_add_out|to_(q|k|v|out)_t|ff_t|ff_context|txt_\w+|text_\w+|context_\w+|"
    r"caption_\w+|cap_\w+"
    r"|attn2\.to_[kv])(\..*|$)"
)
ONCE = re.compile(
    r"(^|.*\.)(time_\w+|timestep_\w+|[tp]_embedder|adaln_\w+|adaLN_modulation|norm_out|norm1\w*|"
    r"distilled_guidance_layer)(\..*|$)"
)


def measured(config: dict[str, Any], family: Family) -> Structure:
    """The structure of a config that ``family`` claims.

    Some blocks have layers for the text alone: their other layers are applied to the image. The layers of all other
    blocks are applied to both.
    """
    import diffusers
    import torch

    with torch.device("meta"):
        model = getattr(diffusers, family.model_class).from_config(config)
    convolutions = torch.nn.Conv2d | torch.nn.Conv3d
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | convolutions)
    }
    split = {
        block for block in family.blocks if any(TEXT.match(name) for name in linears if name.startswith(f"{block}."))
    }

    def runs(name: str) -> str:
        if name in (family.embedder, family.head):
            return "image"
        if re.fullmatch(family.awq_pattern, name) or ONCE.match(name):
            return "once"
        if TEXT.match(name):
            return "text"
        return "image" if name.partition(".")[0] in split else "both"

    layers = tuple(
        Layer(
            name,
            module.weight[0].numel(),
            module.weight.shape[0],
            module.weight.numel(),
            0 if module.bias is None else module.bias.numel(),
            runs(name),
            isinstance(module, convolutions),
            family.token_fraction(name, model.config) if runs(name) == "image" else 1.0,
        )
        for name, module in linears.items()
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    held = sum(layer.weights + layer.bias for layer in layers)
    blocks, text = len(family.block_modules(model)), family.text_width(model.config)
    width = linears[family.embedder].weight.shape[0]
    if all(layer.token_fraction == 1 for layer in layers):
        attentions = [module for module in model.modules() if hasattr(module, "is_cross_attention")]
        cross = sum(module.is_cross_attention for module in attentions)
        if cross:  # the others are over the image alone
            linear = sum("Linear" in type(module.processor).__name__ for module in attentions)
            counts = {"alone": len(attentions) - cross - linear, "cross": cross, "linear": linear}
            if linear:
                counts["head_dim"] = model.config.attention_head_dim
            return Structure(layers, total - held, blocks, width, text, **counts)
        return Structure(layers, total - held, blocks, width, text, quadratic=blocks)
    # Several grids: attn1 is over the image's cells alone, attn2 from them to the text.
    queries = [layer for layer in layers if layer.name.endswith(("attn1.to_q", "attn2.to_q"))]
    alone = sum(layer.token_fraction**2 * layer.outputs / width for layer in queries if "attn1" in layer.name)
    cross = sum(layer.token_fraction * layer.outputs / width for layer in queries if "attn2" in layer.name)
    # For the size of activations: attentions and residual blocks, each by its part of the finest grid at its width.
    parts = [layer for layer in layers if layer.name.endswith(("attn1.to_q", ".conv1"))]
    blocks = max(1, round(sum(layer.token_fraction * layer.outputs / width for layer in parts)))
    return Structure(layers, total - held, blocks, width, text, alone=alone, cross=cross)
