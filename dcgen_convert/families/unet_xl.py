"""Stable Diffusion XL, experimental: the `UNet2DConditionModel` that is told the size of the picture too. It predicts
epsilon.

Source: diffusers 0.42 pipeline_stable_diffusion_xl.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dcgen_convert.families import ddpm
from dcgen_convert.families.base import Network, Pipeline, Text
from dcgen_convert.families.tensors import constant_rows
from dcgen_convert.families.unet import PLAIN, UNet

if TYPE_CHECKING:
    from torch import Tensor

TOLD = {"addition_embed_type": "text_time"}  # the config value of a network with these inputs


class UNetXL(UNet):
    name = "unet-xl"
    pipeline_class = "StableDiffusionXLPipeline"
    plain = {**PLAIN, **TOLD}
    layouts = {
        "diffusers": ("conv_in.", "add_embedding.linear_1.", "mid_block.attentions.0.transformer_blocks.0.attn2.")
    }
    text_keys = ("encoder_hidden_states", "text_embeds")
    recipe = "image"
    default_guidance = 5.0

    def claims(self, config: Mapping[str, Any]) -> bool:
        return super().claims(config) and all(config.get(key) == value for key, value in TOLD.items())

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        return {**super().convert_config(config, factor, channels, side), "pixels_per_latent": factor}

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"force_upcast": False}  # the pipeline asks for it when its weights are float16

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """epsilon at z_t, of pictures that were neither scaled nor cropped."""
        pixels = model.config.get("pixels_per_latent", 8)
        size = z.shape[2] * pixels, z.shape[3] * pixels
        return model(
            ddpm.network_input(z, t),
            ddpm.step_at(t, ddpm.SCALED_LINEAR),
            encoder_hidden_states=text["encoder_hidden_states"],
            added_cond_kwargs={"text_embeds": text["text_embeds"], "time_ids": constant_rows(z, *size, 0, 0, *size)},
            return_dict=False,
        )[0]

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        """As for other U-Nets ``length`` is not used; the condition of the empty prompt is zero."""
        import torch

        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if pipeline.config.force_zeros_for_empty_prompt:
            kept = torch.tensor([prompt != "" for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds * kept[:, None, None], pooled * kept[:, None]
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}
