"""Krea 2: `Krea2Transformer2DModel`. Source: diffusers 0.42 pipeline_krea2.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.shifts import linear_mu
from dcgen_convert.families.tensors import token_ids

if TYPE_CHECKING:
    from torch import Tensor


class Krea2(Family):
    name = "krea2"
    model_class = "Krea2Transformer2DModel"
    single_file = True
    pipeline_class = "Krea2Pipeline"
    embedder = "img_in"
    head = "final_layer.linear"
    in_order = out_order = "c p1 p2"
    guidance = "cfg"
    layouts = {"diffusers": ("text_fusion.projector.", "img_in."), "original": ("txtfusion.projector.",)}
    text_keys = ("encoder_hidden_states", "encoder_attention_mask")
    blocks = ("transformer_blocks",)
    lora_targets = r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_gate|to_out\.0)|ff\.(gate|up|down))"
    bundle_tier = 2
    default_px = 1024
    default_steps = 28
    default_guidance = 4.5
    text_length = 512

    def patch(self, config: dict[str, Any], channels: int) -> int:
        return math.isqrt(config["in_channels"] // channels)  # the pipeline packs; the size is in its model_index.json

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return 6400 * 16**2  # the last of the tokens on the line of mu in its pipeline

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        return {**config, "in_channels": channels}

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"latent_frames": True}

    def mu(self, tokens: int, scheduler: dict[str, Any]) -> float:
        return linear_mu(tokens, {"max_image_seq_len": 6400, **scheduler})

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        import torch

        patch = self.patch(model.config, z.shape[1])
        ids = token_ids(z.shape[2] // patch, z.shape[3] // patch, z.float())
        output = model(
            hidden_states=self.tokens(z, patch),
            timestep=t.to(z.dtype),
            position_ids=torch.cat([ids.new_zeros(text["encoder_hidden_states"].shape[1], 3), ids]),
            return_dict=False,
            **text,
        )[0]
        return self.untokens(output, z.shape[2:], patch)

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        embeds, mask = pipeline.encode_prompt(prompts, max_sequence_length=length)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
