"""AuraFlow: `AuraFlowTransformer2DModel`. Source: diffusers 0.42 pipeline_aura_flow.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import added_positions

if TYPE_CHECKING:
    from torch import Tensor


class AuraFlow(Family):
    name = "auraflow"
    model_class = "AuraFlowTransformer2DModel"
    single_file = True
    pipeline_class = "AuraFlowPipeline"
    embedder = "pos_embed.proj"
    head = "proj_out"
    in_order = "c p1 p2"
    out_order = "p1 p2 c"
    guidance = "cfg"
    layouts = {
        "diffusers": ("register_tokens", "joint_transformer_blocks.0."),
        "original": ("register_tokens", "double_layers.0.attn.w2q."),
    }
    text_keys = ("encoder_hidden_states",)
    blocks = ("joint_transformer_blocks", "single_transformer_blocks")
    lora_targets = (
        r"(joint|single)_transformer_blocks\.\d+\."
        r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)|(ff|"
        r"ff_context)\.(linear_1|linear_2|out_projection))"
    )
    awq_pattern = r"(joint|single)_transformer_blocks\.\d+\.norm1(_context)?\.linear"
    bundle_tier = 1
    default_px = 1024
    default_steps = 50
    default_guidance = 3.5
    text_length = 256

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        side = self.table_side(config)
        return side and (16 * side) ** 2  # its positions are learnt, and trained to the end of their table

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        # pos_embed_max_size stays: the position table is learnt. The model crops its centre as before.
        return {
            **config,
            "in_channels": channels,
            "out_channels": channels,
            "patch_size": 1,
            "sample_size": side // factor,
        }

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"block_out_channels": list(config["encoder_block_out_channels"])}

    def table_side(self, config: dict[str, Any]) -> int | None:
        return math.isqrt(config.get("pos_embed_max_size", 1024))

    def position_term(self, model: Network, grid: tuple[int, ...]) -> Tensor | None:
        return added_positions(model.pos_embed, model.config.in_channels, grid)

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        return model(z, timestep=t.to(z.dtype), return_dict=False, **text)[0]

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        embeds, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
        return {"encoder_hidden_states": embeds}
