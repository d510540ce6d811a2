"""PixArt-alpha and Sigma: `PixArtTransformer2DModel`. It predicts epsilon and a learned sigma.

Sources: diffusers 0.42 pipeline_pixart_alpha.py, pipeline_pixart_sigma.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dcgen_convert.families import ddpm
from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import added_positions, constant_rows

if TYPE_CHECKING:
    from torch import Tensor

# alpha's model and pipeline are conditioned on the picture's size if sample_size has this value
MULTI_SCALE = 128


class PixArt(Family):
    name = "pixart"
    model_class = "PixArtTransformer2DModel"
    pipeline_class = "PixArtSigmaPipeline"
    other_pipelines = ("PixArtAlphaPipeline",)
    embedder = "pos_embed.proj"
    head = "proj_out"
    in_order = "c p1 p2"
    out_order = "p1 p2 c"
    guidance = "cfg"
    prediction = "epsilon"
    layouts = {
        "diffusers": ("adaln_single.linear.", "pos_embed.proj.", "caption_projection."),
        "original": ("t_block.1.", "y_embedder.y_proj."),
    }
    text_keys = ("encoder_hidden_states", "encoder_attention_mask")
    unused = ("pos_embed.pos_embed", "caption_projection.y_embedding")
    blocks = ("transformer_blocks",)
    lora_targets = r"transformer_blocks\.\d+\.((attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
    dense_pattern = r"transformer_blocks\.\d+\.attn2\.to_[kv]"  # keys and values of the cross-attention, as in SANA
    bundle_tier = 1
    fixed_arguments = {"use_resolution_binning": False}  # the bins fit sample sizes of f8 latents only
    default_steps = 20
    default_guidance = 4.5
    text_length = 300

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        size, patch = config.get("sample_size", 128), config.get("patch_size", 2)
        conditioned = sized(config)
        new_size = MULTI_SCALE if conditioned else side // factor
        # The positions of a picture end at (sample_size / patch) / interpolation_scale for every grid: keep this end.
        scale = config.get("interpolation_scale") or max(size // 64, 1)
        return {
            **config,
            "in_channels": channels,
            "out_channels": 2 * channels,
            "patch_size": 1,
            "sample_size": new_size,
            "interpolation_scale": scale * new_size / (size // patch),
            "use_additional_conditions": conditioned,
            "pixels_per_latent": factor,
        }

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"block_out_channels": list(config["encoder_block_out_channels"])}

    def position_term(self, model: Network, grid: tuple[int, ...]) -> Tensor | None:
        return added_positions(model.pos_embed, model.config.in_channels, grid)

    def noise_times(self) -> Tensor:
        return ddpm.noise_times(ddpm.LINEAR)

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """epsilon at z_t."""
        time = ddpm.step_at(t, ddpm.LINEAR)
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if sized(model.config):
            pixels = model.config.get("pixels_per_latent", 8)
            height, width = z.shape[2] * pixels, z.shape[3] * pixels
            size = {
                "resolution": constant_rows(z, height, width),
                "aspect_ratio": constant_rows(z, height / width),
            }
        output = model(ddpm.network_input(z, t), timestep=time, added_cond_kwargs=size, return_dict=False, **text)[0]
        return output[:, : z.shape[1]]  # the rest is the learned sigma; the stock pipeline drops it too

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def sized(config: Mapping[str, Any]) -> bool:
    """Whether the network is conditioned on the picture's size (alpha at 1024 px)."""
    given = config.get("use_additional_conditions")
    return config.get("sample_size") == MULTI_SCALE if given is None else bool(given)
