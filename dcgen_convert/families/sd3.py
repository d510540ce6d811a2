"""Stable Diffusion 3 and 3.5: `SD3Transformer2DModel`. Source: diffusers 0.42 pipeline_stable_diffusion_3.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import added_positions

if TYPE_CHECKING:
    from torch import Tensor


class SD3(Family):
    name = "sd3"
    model_class = "SD3Transformer2DModel"
    single_file = True
    pipeline_class = "StableDiffusion3Pipeline"
    embedder = "pos_embed.proj"
    head = "proj_out"
    in_order = "c p1 p2"
    out_order = "p1 p2 c"
    guidance = "cfg"
    layouts = {
        "diffusers": ("pos_embed.pos_embed", "pos_embed.proj.", "time_text_embed."),
        "original": ("joint_blocks.0.context_block.adaLN_modulation.1.",),
    }
    text_keys = ("encoder_hidden_states", "pooled_projections")
    blocks = ("transformer_blocks",)
    lora_targets = (
        r"transformer_blocks\.\d+\."
        r"(attn2?\.(to_q|to_k|to_v|to_out\.0)|attn\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)|(ff|"
        r"ff_context)\.net\.(0\.proj|2))"
    )
    awq_pattern = r"transformer_blocks\.\d+\.norm1(_context)?\.linear"
    bundle_tier = 1
    default_steps = 28
    default_guidance = 4.5
    text_length = 256

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        if config.get("dual_attention_layers"):
            return 2_000_000  # 3.5 medium: "0.25 to 2 megapixels", as its authors say
        return super().most_pixels(config)

    def least_pixels(self, config: dict[str, Any]) -> int | None:
        return 250_000 if config.get("dual_attention_layers") else None

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        # pos_embed_max_size stays: the sincos table is in the checkpoint. The model crops its centre as before.
        return {
            **config,
            "in_channels": channels,
            "out_channels": channels,
            "patch_size": 1,
            "sample_size": side // factor,
        }

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"block_out_channels": list(config["encoder_block_out_channels"]), "shift_factor": 0.0}

    def table_side(self, config: dict[str, Any]) -> int | None:
        return config.get("pos_embed_max_size", 96)

    def position_term(self, model: Network, grid: tuple[int, ...]) -> Tensor | None:
        return added_positions(model.pos_embed, model.config.in_channels, grid)

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        return model(hidden_states=z, timestep=(t * 1000).to(z.dtype), return_dict=False, **text)[0]

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
