"""FLUX.1 dev, Krea and schnell: `FluxTransformer2DModel`.

Sources: diffusers 0.42 pipeline_flux.py; the 1K and 4K models that the DC-Gen authors published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import guidance_input, token_ids

if TYPE_CHECKING:
    from torch import Tensor


class Flux(Family):
    name = "flux"
    model_class = "FluxTransformer2DModel"
    single_file = True
    pipeline_class = "FluxPipeline"
    embedder = "x_embedder"
    head = "proj_out"
    in_order = out_order = "c p1 p2"
    guidance = "embedded"  # schnell (guidance_embeds false) has no guidance input
    official_layout = True
    comfyui = True
    nunchaku_container = True
    layouts = {
        "bfl": ("double_blocks.0.img_attn.norm.key_norm.scale", "vector_in."),
        "diffusers": ("single_transformer_blocks.0.proj_mlp.", "time_text_embed.text_embedder"),
    }
    text_keys = ("encoder_hidden_states", "pooled_projections")
    blocks = ("transformer_blocks", "single_transformer_blocks")
    # As published: the linears of attention and MLP, without the AdaLN linears, the embedders and the last proj_out.
    # FLUX.1 has 418 of them.
    lora_targets = (
        r"(transformer_blocks|single_transformer_blocks)\.\d+\."
        r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )
    awq_pattern = r"(transformer_blocks\.\d+\.norm1(_context)?|single_transformer_blocks\.\d+\.norm)\.linear"
    bundle_tier = 2
    recipe = "flux-dev"
    default_cells: ClassVar[int | None] = 128
    default_steps = 20
    default_guidance = 3.5
    text_length = 256

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return 2_000_000  # "0.1 to 2.0 megapixels", as its authors say

    def least_pixels(self, config: dict[str, Any]) -> int | None:
        return 100_000

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        reads, writes = config["in_channels"], config.get("out_channels") or config["in_channels"]
        if reads != writes:
            raise InputError(
                f"this FLUX.1 model reads {reads} channels and writes {writes}: it is a Fill, Depth or Canny variant, "
                "which sees two pictures",
                "give the text-to-image model (dev, Krea or schnell): the conversion trains with one picture",
            )
        return {**config, "in_channels": channels, "out_channels": channels}

    def comfyui_network(self, config: dict[str, Any]) -> dict[str, Any]:
        # ComfyUI takes every FLUX.1 for a model with patch 2, 16 channels and heads of 128 numbers.
        return {
            "image_model": "flux",
            "patch_size": 1,
            "in_channels": config["in_channels"],
            "out_channels": config.get("out_channels") or config["in_channels"],
            "num_heads": config["num_attention_heads"],
            "axes_dim": list(config["axes_dims_rope"]),
        }

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        patch = self.patch(model.config, z.shape[1])
        ids = token_ids(z.shape[2] // patch, z.shape[3] // patch, z)
        return self.untokens(self.run(model, self.tokens(z, patch), ids, t, text, guidance), z.shape[2:], patch)

    def run(
        self, model: Network, tokens: Tensor, ids: Tensor, t: Tensor, text: Text, guidance: Tensor | None
    ) -> Tensor:
        """What the network writes for image ``tokens`` (B, N, C p p) with position ``ids`` (N, 3): (B, N, C p p)."""
        import torch

        hidden = text["encoder_hidden_states"]
        output: Tensor = model(
            hidden_states=tokens,
            encoder_hidden_states=hidden,
            pooled_projections=text["pooled_projections"],
            timestep=t.to(tokens.dtype),
            img_ids=ids,
            txt_ids=torch.zeros(hidden.shape[1], 3, device=tokens.device, dtype=tokens.dtype),
            guidance=guidance_input(model, guidance, tokens),
            return_dict=False,
        )[0]
        return output

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        embeds, pooled, _ = pipeline.encode_prompt(prompt=prompts, prompt_2=None, max_sequence_length=length)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
