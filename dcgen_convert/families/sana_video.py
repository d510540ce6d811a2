"""SANA-Video, which draws videos from text: `SanaVideoTransformer3DModel`.

Latent, first and last layer are as Wan's, blocks and text as SANA's. Its 720p models work on LTX-2's f32 autoencoder,
and are no sources. Source: diffusers 0.42 pipeline_sana_video.py.
"""

from __future__ import annotations

from typing import Any

from dcgen_convert.families.base import Family, Pipeline, Text
from dcgen_convert.families.sana import Sana
from dcgen_convert.families.wan import Wan


class SanaVideo(Wan):
    name = "sana-video"
    model_class = "SanaVideoTransformer3DModel"
    single_file = False
    pipeline_class = "SanaVideoPipeline"
    layouts = {"diffusers": ("patch_embedding.", "caption_norm.", "transformer_blocks.0.ff.conv_temp.")}
    text_keys = Sana.text_keys
    blocks = Sana.blocks
    lora_targets = Sana.lora_targets
    dense_pattern = Sana.dense_pattern
    index_values = {}
    unquantised = ": `nunchaku_lite` of diffusers has no mapping for SANA-Video, and `bfl` was tried with pictures only"
    recipe = "sana-video-480p"
    fixed_arguments = Sana.fixed_arguments
    frames_argument = "frames"
    default_guidance = 6.0
    text_length = Sana.text_length

    def text_width(self, config: dict[str, Any]) -> int:
        return Family.text_width(self, config)

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        return Sana().encode_text(pipeline, prompts, length)
