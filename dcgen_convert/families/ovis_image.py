"""Ovis-Image: `OvisImageTransformer2DModel`, two streams and then one, as FLUX.1, without pooled text.

Source: diffusers 0.42 pipeline_ovis_image.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import token_ids

if TYPE_CHECKING:
    from torch import Tensor


class OvisImage(Family):
    name = "ovis-image"
    model_class = "OvisImageTransformer2DModel"
    pipeline_class = "OvisImagePipeline"
    embedder = "x_embedder"
    head = "proj_out"
    in_order = out_order = "c p1 p2"
    guidance = "cfg"
    layouts = {"diffusers": ("single_transformer_blocks.0.proj_mlp.", "context_embedder_norm.")}
    text_keys = ("encoder_hidden_states",)
    blocks = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = (
        r"(transformer_blocks|single_transformer_blocks)\.\d+\."
        r"(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|(ff|ff_context)\.net\.(0\.proj|2)|proj_mlp|proj_out)"
    )
    awq_pattern = r"(transformer_blocks\.\d+\.norm1(_context)?|single_transformer_blocks\.\d+\.norm)\.linear"
    bundle_tier = 2
    default_cells = 128
    default_steps = 50
    default_guidance = 5.0
    text_length = 256  # the most that the pipeline takes. The network has no mask, so the padding counts

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return 1024**2  # what the pipeline draws when it is told no size, "for the best results"

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        return {**config, "in_channels": channels, "out_channels": channels}

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        import torch

        patch = self.patch(model.config, z.shape[1])
        words = torch.arange(text["encoder_hidden_states"].shape[1], device=z.device, dtype=z.dtype)
        output = model(
            hidden_states=self.tokens(z, patch),  # (B, N, C p p)
            timestep=t.to(z.dtype),
            img_ids=token_ids(z.shape[2] // patch, z.shape[3] // patch, z),
            txt_ids=torch.stack([torch.zeros_like(words), words, words], dim=1),
            return_dict=False,
            **text,
        )[0]
        return self.untokens(output, z.shape[2:], patch)

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        embeds, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
        return {"encoder_hidden_states": embeds}
