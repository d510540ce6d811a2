"""PRX: `PRXTransformer2DModel`, whose blocks read the text and do not write it.

Its stock pipeline takes an AutoencoderDC as it is. A network with `resolution_embeds` is told the sides of its latent:
those of the coarse one, as its positions are.

Source: diffusers 0.42 pipeline_prx.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.cleaning import require_ftfy

if TYPE_CHECKING:
    from torch import Tensor


class PRX(Family):
    name = "prx"
    model_class = "PRXTransformer2DModel"
    pipeline_class = "PRXPipeline"
    embedder = "img_in"
    head = "final_layer.linear"
    in_order = out_order = "c p1 p2"
    guidance = "cfg"
    layouts = {"diffusers": ("blocks.0.attention.img_qkv_proj.", "txt_in.", "img_in.")}
    text_keys = ("encoder_hidden_states", "attention_mask")
    blocks = ("blocks",)
    lora_targets = r"blocks\.\d+\.(attention\.(img_qkv_proj|txt_kv_proj|to_out\.0)|gate_proj|up_proj|down_proj)"
    awq_pattern = r"blocks\.\d+\.modulation\.lin"
    bundle_tier = 0
    index_side = "default_sample_size"
    one_prompt = True  # it makes two time steps, of the prompt and of the empty one, however many prompts there are
    length_argument = "tokenizer_max_length"
    fixed_arguments = {"use_resolution_binning": False}
    default_steps = 28
    default_guidance = 5.0
    text_length = 256

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        if config.get("bottleneck_size"):
            raise InputError(
                "this PRX model reads its patches through a bottleneck: it draws pixels and has no autoencoder",
                "give a PRX model with an autoencoder",
            )
        return {**config, "in_channels": channels, "patch_size": 1}

    def text_width(self, config: dict[str, Any]) -> int:
        return config["context_in_dim"]

    def doubt(self, name: str, scheduler: Mapping[str, Any]) -> str | None:
        if "distilled" not in name.lower():  # no config tells them apart
            return None
        return (
            f"{name} may be distilled to 8 steps without guidance (its name says distilled), which flow matching alone "
            "undoes (--recipe few-steps)"
        )

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        return model(hidden_states=z, timestep=t.float(), return_dict=False, **text)[0]

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        require_ftfy(self.pipeline_class)
        embeds, mask, *_ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, tokenizer_max_length=length
        )
        return {"encoder_hidden_states": embeds, "attention_mask": mask}
