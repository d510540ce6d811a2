"""Wan 2.2 I2V A14B, from a picture and text: the input of Wan 2.1 I2V without an image encoder, and two networks.

Their noise levels meet at .9. Both have the same guidance. Source: diffusers 0.42 pipeline_wan_i2v.py;
Wan-Video/Wan2.2 wan_i2v_A14B.py.
"""

from __future__ import annotations

from dcgen_convert.families.base import Pipeline, Text
from dcgen_convert.families.cleaning import require_ftfy
from dcgen_convert.families.wan import Wan
from dcgen_convert.families.wan_a14b import WanA14B
from dcgen_convert.families.wan_image import WanImage


class WanImageA14B(WanA14B, WanImage):
    name = "wan-image-a14b"
    text_keys = Wan.text_keys
    picture_tokens = 0
    recipe = "wan-2.2-i2v-a14b-480p"
    default_guidance = 3.5
    lessened = 1.0

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        require_ftfy(self.pipeline_class)
        return Wan.encode_text(self, pipeline, prompts, length)
