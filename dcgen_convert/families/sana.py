"""SANA and SANA-1.5: `SanaTransformer2DModel`. Source: diffusers 0.42 pipeline_sana.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcgen_convert.families.base import Family, Network, Pipeline, Text

if TYPE_CHECKING:
    from torch import Tensor

BINNED = (16, 32, 64, 128)  # sample sizes for which the pipeline has resolution bins, of 512, 1024, 2048 and 4096 px


class Sana(Family):
    name = "sana"
    model_class = "SanaTransformer2DModel"
    single_file = True
    pipeline_class = "SanaPipeline"
    embedder = "patch_embed.proj"
    head = "proj_out"
    in_order = "c p1 p2"
    out_order = "p1 p2 c"
    guidance = "cfg"
    layouts = {
        "diffusers": ("caption_norm.", "patch_embed.proj.", "transformer_blocks.0.ff.conv_depth."),
        "original": ("attention_y_norm.", "blocks.0.cross_attn.q_linear."),
    }
    text_keys = ("encoder_hidden_states", "encoder_attention_mask")
    blocks = ("transformer_blocks",)
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)|"
        r"transformer_blocks\.\d+\.ff\.conv_(inverted|point)"
    )
    dense_pattern = r"transformer_blocks\.\d+\.attn2\.to_[kv]"  # keys and values of the cross-attention
    bundle_tier = 0
    recipe = "sana-1.6b"
    default_px = 1024
    fixed_arguments = {"complex_human_instruction": None, "use_resolution_binning": False}
    default_steps = 20
    default_guidance = 4.5
    text_length = 300

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        size = config.get("sample_size")
        return (32 * size) ** 2 if size else None  # cells of an f32 autoencoder

    def least_pixels(self, config: dict[str, Any]) -> int | None:
        return self.most_pixels(config)  # its pictures of other shapes have the same area

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        size = config.get("sample_size")
        # The pipeline chooses its resolution bins by sample_size, not by the autoencoder: a value with bins must stay.
        if size not in BINNED:
            size = side // factor
        return {**config, "in_channels": channels, "out_channels": channels, "patch_size": 1, "sample_size": size}

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        return model(
            hidden_states=z,
            encoder_hidden_states=text["encoder_hidden_states"],
            encoder_attention_mask=text["encoder_attention_mask"],
            timestep=(t * 1000 * model.config.timestep_scale).to(z.dtype),
            return_dict=False,
        )[0]

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompt=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            complex_human_instruction=None,
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
