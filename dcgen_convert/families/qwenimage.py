"""Qwen-Image: `QwenImageTransformer2DModel`. Source: diffusers 0.42 pipeline_qwenimage.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from dcgen_convert.families.base import CallSettings, Family, Network, Pipeline, Text

if TYPE_CHECKING:
    from torch import Tensor


class QwenImage(Family):
    name = "qwenimage"
    model_class = "QwenImageTransformer2DModel"
    single_file = True
    pipeline_class = "QwenImagePipeline"
    embedder = "img_in"
    head = "proj_out"
    in_order = out_order = "c p1 p2"
    guidance = "cfg"
    layouts = {"diffusers": ("txt_norm.", "img_in.", "transformer_blocks.0.img_mod.1.")}
    text_keys = ("encoder_hidden_states", "encoder_hidden_states_mask")
    blocks = ("transformer_blocks",)
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|(img_mlp|txt_mlp)\.net\.(0\.proj|2))"
    )
    awq_pattern = r"transformer_blocks\.\d+\.(img_mod|txt_mod)\.1"
    bundle_tier = 2
    default_cells: ClassVar[int | None] = 128
    guidance_argument = "true_cfg_scale"
    default_steps = 50
    default_guidance = 4.0
    text_length = 512

    def patch(self, config: dict[str, Any], channels: int) -> int:
        return math.isqrt(config["in_channels"] // channels)  # of packed tokens; patch_size belongs to the output alone

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return 1328**2  # the square of the sizes that its authors give

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        return {**config, "in_channels": channels, "out_channels": channels, "patch_size": 1}

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"latent_frames": True}

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        patch = self.patch(model.config, z.shape[1])
        grid = (1, z.shape[2] // patch, z.shape[3] // patch)
        output = model(
            hidden_states=self.tokens(z, patch),
            timestep=t.to(z.dtype),
            img_shapes=[[grid]] * len(z),
            return_dict=False,
            **text,
        )[0]
        return self.untokens(output, z.shape[2:], patch)

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        import torch

        embeds, mask = pipeline.encode_prompt(prompts, max_sequence_length=length)
        if mask is None:  # all prompts have the same length
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        missing = length - embeds.shape[1]
        return {
            "encoder_hidden_states": torch.nn.functional.pad(embeds, (0, 0, 0, missing)),
            "encoder_hidden_states_mask": torch.nn.functional.pad(mask, (0, missing)),
        }

    def pipeline_call(
        self, pipeline: Pipeline | None, prompts: list[str], **settings: Unpack[CallSettings]
    ) -> dict[str, Any]:
        named = {"prompt": prompts, "negative_prompt": [""] * len(prompts)}
        return {**named, **super().pipeline_call(pipeline, prompts, **settings)}
