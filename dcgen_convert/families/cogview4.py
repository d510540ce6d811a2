"""CogView4: `CogView4Transformer2DModel`. Source: diffusers 0.42 pipeline_cogview4.py."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import constant_rows, padded

if TYPE_CHECKING:
    from torch import Tensor


class CogView4(Family):
    name = "cogview4"
    model_class = "CogView4Transformer2DModel"
    pipeline_class = "CogView4Pipeline"
    embedder = "patch_embed.proj"  # patch_embed.text_proj beside it stays as it is
    head = "proj_out"
    in_order = out_order = "c p1 p2"
    guidance = "cfg"
    layouts = {"diffusers": ("patch_embed.text_proj.", "time_condition_embed.")}
    text_keys = ("encoder_hidden_states", "text_mask")
    blocks = ("transformer_blocks",)
    lora_targets = r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
    awq_pattern = r"transformer_blocks\.\d+\.norm1\.linear"
    bundle_tier = 2
    fixed_shift = True
    default_steps = 50
    default_guidance = 3.5
    text_length = 256

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return 2**21  # as its authors say

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        # The transformer itself packs 2 x 2 cells: it reads the adapter's grid, twice as fine as the deep latent.
        return {
            **config,
            "in_channels": channels // 4,
            "out_channels": channels // 4,
            "patch_size": 2,
            "sample_size": 2 * side // factor,
            "pixels_per_latent": factor,
        }

    def shift(self, tokens: int, scheduler: dict[str, Any]) -> float:
        if scheduler.get("time_shift_type") != "linear" or self.mu(tokens, scheduler) != self.mu(tokens, {}):
            raise InputError(
                "CogView4's network receives the step before the timestep shift, so its scheduler's shift must stay",
                "use CogView4's own scheduler config",
            )
        return super().shift(tokens, scheduler)

    def mu(self, tokens: int, scheduler: dict[str, Any]) -> float:
        base, slope = scheduler.get("base_shift", 0.25), scheduler.get("max_shift", 0.75)
        return math.sqrt(tokens / scheduler.get("base_image_seq_len", 256)) * slope + base

    def image_tokens(self, features: Any, count: int, text: Text) -> Tensor:
        return features[0] if isinstance(features, tuple) else features  # blocks return (image, text)

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        import torch

        # The pipeline shifts the noise level, and the network receives the step s from before the shift:
        # t = mu s / (1 + (mu - 1) s).
        mu = self.mu(z.shape[2] * z.shape[3] // self.patch(model.config, z.shape[1]) ** 2, {})
        steps = t / (mu - (mu - 1) * t)
        pixels = model.config.get("pixels_per_latent", 8)
        size = constant_rows(z, z.shape[2] * pixels, z.shape[3] * pixels)
        fine, outputs, start = self.expose(z, model.config), [], 0
        # The network has no mask for text tokens. So captions of the same length go through it together, in order.
        for length, run in groupby(text["text_mask"].sum(1).long().tolist()):
            rows = slice(start, start := start + len(list(run)))
            output = model(
                hidden_states=fine[rows],
                encoder_hidden_states=text["encoder_hidden_states"][rows, :length],
                timestep=steps[rows] * 1000,
                original_size=size[rows],
                target_size=size[rows],
                crop_coords=torch.zeros_like(size[rows]),
                return_dict=False,
            )[0]
            outputs.append(output)
        return self.collect(torch.cat(outputs), z.shape[1])

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        """Encode prompt by prompt: the stock pipeline pads each prompt to a multiple of 16 tokens, and the network
        attends to this padding.
        """
        rows = [
            pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=length)[0][0][
                -length:
            ]
            for prompt in prompts
        ]
        embeds, mask = padded(rows, length)
        return {"encoder_hidden_states": embeds, "text_mask": mask}
