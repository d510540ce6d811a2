"""HunyuanImage 2.1: `HunyuanImageTransformer2DModel`. Its own autoencoder is f32c64 already.

Source: diffusers 0.42 pipeline_hunyuanimage.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import guidance_input

if TYPE_CHECKING:
    from torch import Tensor


class HunyuanImage(Family):
    name = "hunyuanimage"
    model_class = "HunyuanImageTransformer2DModel"
    pipeline_class = "HunyuanImagePipeline"
    embedder = "x_embedder.proj"
    head = "proj_out"
    in_order = out_order = "c p1 p2"
    guidance = "embedded"  # with guidance_embeds; otherwise the guider of the pipeline does the guidance
    layouts = {"diffusers": ("context_embedder.token_refiner.", "x_embedder.proj.", "time_guidance_embed.")}
    text_keys = (
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
    )
    blocks = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = (
        r"(transformer_blocks|single_transformer_blocks)\.\d+\."
        r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )
    awq_pattern = r"(transformer_blocks\.\d+\.norm1(_context)?|single_transformer_blocks\.\d+\.norm)\.linear"
    bundle_tier = 1
    default_cells = 64
    guidance_argument = "distilled_guidance_scale"
    length_argument = ""
    default_steps = 50
    default_guidance = 3.25
    text_length = 512

    def patch(self, config: dict[str, Any], channels: int) -> int:
        return math.isqrt(config["in_channels"] * math.prod(config["patch_size"]) // channels)

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return 2048**2  # "2K", the only size that its authors give

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        if config.get("use_meanflow"):
            raise InputError(
                "this HunyuanImage model was distilled to a few steps and has a second time input (use_meanflow): no "
                "stage here trains it",
                "give the undistilled model",
            )
        return {**config, "in_channels": channels, "out_channels": channels, "patch_size": [1, 1]}

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"spatial_compression_ratio": 2 ** (len(config["encoder_block_out_channels"]) - 1)}

    def image_tokens(self, features: Any, count: int, text: Text) -> Tensor:
        return features[0] if isinstance(features, tuple) else features  # blocks return (image, text)

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        return model(
            hidden_states=z,
            timestep=(t * 1000).to(z.dtype),
            guidance=guidance_input(model, guidance, z, 1000),
            return_dict=False,
            **text,
        )[0]

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        """Caption tokens come first and padding after them. The network itself uses this order too."""
        import torch

        embeds, mask, glyphs, glyph_mask = pipeline.encode_prompt(prompts, batch_size=len(prompts))
        order = torch.argsort(mask, dim=1, descending=True, stable=True)[:, :length]
        return {
            "encoder_hidden_states": torch.take_along_dim(embeds, order[..., None], dim=1),
            "encoder_attention_mask": torch.take_along_dim(mask, order, dim=1),
            "encoder_hidden_states_2": glyphs,
            "encoder_attention_mask_2": glyph_mask,
        }
