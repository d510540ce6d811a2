"""FLUX.2 dev and klein: `Flux2Transformer2DModel`.

Sources: diffusers 0.42 pipeline_flux2.py, pipeline_flux2_klein.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcgen_convert.families.base import Family, Network, Pipeline, Text, guidance_input

if TYPE_CHECKING:
    from torch import Tensor


class Flux2(Family):
    name = "flux2"
    model_class = "Flux2Transformer2DModel"
    pipeline_class = "Flux2Pipeline"
    other_pipelines = ("Flux2KleinPipeline",)
    embedder = "x_embedder"
    head = "proj_out"
    in_order = out_order = "c p1 p2"
    guidance = "embedded"  # dev; klein (guidance_embeds false) gets its guidance from its pipeline
    layouts = {
        "bfl": ("single_stream_modulation.lin.",),
        "diffusers": ("single_stream_modulation.linear.",),
    }
    text_keys = ("encoder_hidden_states",)
    blocks = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|(ff|ff_context)\.linear_(in|out))|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )  # all blocks use one modulation, which lies outside them
    bundle_tier = 2
    experimental = (
        "FLUX.2 edits pictures too. A conversion trains it to draw from text alone, so edits with the converted model "
        "are untested"
    )
    default_cells = 128
    default_steps = 28
    default_guidance = 4.0
    text_length = 512

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return 4_000_000  # "up to 4 megapixels", as its authors say

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        return {**config, "in_channels": channels, "out_channels": channels}

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"latent_batch_norm": True}

    def mu(self, tokens: int, scheduler: dict[str, Any]) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, self.default_steps)  # the pipeline's own formula; it depends on the steps

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        import torch

        patch = self.patch(model.config, z.shape[1])
        rows, columns = (torch.arange(side // patch, device=z.device) for side in z.shape[2:])
        words = torch.arange(text["encoder_hidden_states"].shape[1], device=z.device)
        zero = torch.zeros(1, dtype=torch.long, device=z.device)
        output = model(
            hidden_states=self.tokens(z, patch),
            timestep=t.to(z.dtype),
            guidance=guidance_input(model, guidance, z),
            img_ids=torch.cartesian_prod(zero, rows, columns, zero),  # axes: time, row, column, word
            txt_ids=torch.cartesian_prod(zero, zero, zero, words),
            return_dict=False,
            **text,
        )[0]
        return self.untokens(output, z.shape[2], z.shape[3], patch)

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        return {"encoder_hidden_states": pipeline.encode_prompt(prompts, max_sequence_length=length)[0]}
