"""Lumina-Image 2.0: `Lumina2Transformer2DModel`. It predicts z_0 - eps at the time 1 - t.

Source: diffusers 0.42 pipeline_lumina2.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import Family, Network, Pipeline, Text

if TYPE_CHECKING:
    from torch import Tensor

PIPELINE_FACTOR = 8  # px per latent cell; fixed in the code of the stock pipeline for every autoencoder


class Lumina2(Family):
    name = "lumina2"
    model_class = "Lumina2Transformer2DModel"
    single_file = True
    pipeline_class = "Lumina2Pipeline"
    other_pipelines = ("Lumina2Text2ImgPipeline",)
    embedder = "x_embedder"
    head = "norm_out.linear_2"
    in_order = out_order = "p1 p2 c"
    guidance = "cfg"
    prediction = "reversed"
    layouts = {
        "diffusers": ("time_caption_embed.caption_embedder.1.", "noise_refiner.0."),
        "original": ("cap_embedder.0.", "noise_refiner.0.", "x_embedder."),
    }
    text_keys = ("encoder_hidden_states", "encoder_attention_mask")
    blocks = ("noise_refiner", "layers")
    lora_targets = r"(noise_refiner|layers)\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.linear_[123])"
    awq_pattern = r"(noise_refiner|layers)\.\d+\.norm1\.linear"
    bundle_tier = 2
    default_steps = 30
    default_guidance = 4.0
    text_length = 256

    def pack(self, config: dict[str, Any]) -> int:
        return config["patch_size"]

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        pack = factor // PIPELINE_FACTOR
        if channels % pack**2:
            raise InputError(
                f"Lumina2's pipeline samples on a grid of {PIPELINE_FACTOR} px, on which {channels} channels at "
                f"f{factor} do not fit",
                f"choose an autoencoder whose channels are a multiple of {pack**2}",
            )
        return {
            **config,
            "in_channels": channels // pack**2,
            "out_channels": channels // pack**2,
            "patch_size": pack,
            "sample_size": side // PIPELINE_FACTOR,
        }

    def image_tokens(self, features: Any, count: int, text: Text) -> Tensor:
        """The joint sequence of a picture: the tokens of its caption without padding, then its image tokens."""
        import torch

        if features.shape[1] == count:
            return features
        starts = text["encoder_attention_mask"].sum(1).tolist()
        return torch.stack([row[start : start + count] for row, start in zip(features, starts, strict=True)])

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        output = model(
            hidden_states=self.expose(z, model.config), timestep=(1 - t).to(z.dtype), return_dict=False, **text
        )[0]
        return self.collect(output, z.shape[1])

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        import torch

        embeds, mask, null, null_mask = pipeline.encode_prompt(prompts, negative_prompt="", max_sequence_length=length)
        # The pipeline puts a preamble before every text except the null text.
        empty = torch.tensor([prompt == "" for prompt in prompts], device=mask.device)
        return {
            "encoder_hidden_states": torch.where(empty[:, None, None], null, embeds),
            "encoder_attention_mask": torch.where(empty[:, None], null_mask, mask),
        }
