"""SANA-Sprint: `SanaTransformer2DModel` with a guidance input, distilled to one to four steps.

The network predicts the velocity v of SANA's flow at the noise level t. Unlike SANA it takes t itself, not 1000 t. The
pipeline translates this to TrigFlow (arXiv 2410.11081): the angle a stands for t = sin a / (sin a + cos a), and each
step goes from one estimate of the picture, z_t - t v, to the next.

Source: diffusers 0.42 pipeline_sana_sprint.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Unpack

from dcgen_convert.families.base import CallSettings, Network, Pipeline, Text
from dcgen_convert.families.sana import Sana
from dcgen_convert.families.tensors import guidance_input

if TYPE_CHECKING:
    from torch import Tensor


class SanaSprint(Sana):
    name = "sana-sprint"
    pipeline_class = "SanaSprintPipeline"
    guidance = "embedded"
    few_steps = True
    layouts = {
        "diffusers": ("caption_norm.", "transformer_blocks.0.ff.conv_depth.", "time_embed.guidance_embedder."),
        "original": ("attention_y_norm.", "blocks.0.cross_attn.q_linear.", "cfg_embedder."),
    }
    recipe = "sana-sprint-1.6b"
    default_px = 1024
    default_steps = 2

    def claims(self, config: Mapping[str, Any]) -> bool:
        return super().claims(config) and bool(config.get("guidance_embeds"))

    def shift(self, tokens: int, scheduler: dict[str, Any]) -> float:
        """The shift of SANA. The pipeline's own few angles are not the noise levels at which the model is trained."""
        return 3.0

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        return model(
            hidden_states=z,
            encoder_hidden_states=text["encoder_hidden_states"],
            encoder_attention_mask=text["encoder_attention_mask"],
            guidance=guidance_input(model, guidance, z, model.config.guidance_embeds_scale),
            timestep=t.to(z.dtype),
            return_dict=False,
        )[0]

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        embeds, mask = pipeline.encode_prompt(
            prompt=prompts, max_sequence_length=length, complex_human_instruction=None
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def pipeline_call(
        self, pipeline: Pipeline | None, prompts: list[str], **settings: Unpack[CallSettings]
    ) -> dict[str, Any]:
        call = super().pipeline_call(pipeline, prompts, **settings)
        # The default of intermediate_timesteps is for two steps; the pipeline refuses it with another number.
        return call if settings["steps"] == 2 else {**call, "intermediate_timesteps": None}
