"""Chroma: `ChromaTransformer2DModel`, a FLUX.1 that computes the modulation of all blocks at once.

Source: diffusers 0.42 pipeline_chroma.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import token_ids

if TYPE_CHECKING:
    from torch import Tensor


class Chroma(Family):
    name = "chroma"
    model_class = "ChromaTransformer2DModel"
    single_file = True
    pipeline_class = "ChromaPipeline"
    embedder = "x_embedder"
    head = "proj_out"
    in_order = out_order = "c p1 p2"
    guidance = "cfg"
    layouts = {
        "bfl": ("double_blocks.0.img_attn.norm.key_norm.scale", "distilled_guidance_layer."),
        "diffusers": ("single_transformer_blocks.0.proj_mlp.", "distilled_guidance_layer."),
    }
    text_keys = ("encoder_hidden_states", "attention_mask")
    blocks = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = (
        r"(transformer_blocks|single_transformer_blocks)\.\d+\."
        r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )  # the blocks have no modulation linears
    bundle_tier = 2
    default_cells = 128
    default_steps = 35
    default_guidance = 5.0
    text_length = 512

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return 1024**2  # of Chroma1-HD; Chroma1-Base saw 512 px only, which no config tells

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        return {**config, "in_channels": channels, "out_channels": channels}

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        import torch

        patch = self.patch(model.config, z.shape[1])
        tokens = self.tokens(z, patch)  # (B, N, C p p)
        hidden, mask = text["encoder_hidden_states"], text["attention_mask"]
        output = model(
            hidden_states=tokens,
            encoder_hidden_states=hidden,
            timestep=t.to(z.dtype),
            img_ids=token_ids(z.shape[2] // patch, z.shape[3] // patch, z),
            txt_ids=torch.zeros(hidden.shape[1], 3, device=z.device, dtype=z.dtype),
            attention_mask=torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1),
            return_dict=False,
        )[0]
        return self.untokens(output, z.shape[2:], patch)

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        embeds, _, mask, *_ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"encoder_hidden_states": embeds, "attention_mask": mask}
