"""SANA-Sprint: `SanaTransformer2DModel` with a guidance input, distilled to one to four steps. Source: diffusers 0.42
pipeline_sana_sprint.py.

The network predicts the velocity v of SANA's flow at the noise level t, here not times 1000. The pipeline wraps it into
TrigFlow (arXiv 2410.11081), whose angle a stands for t = sin a / (sin a + cos a), and steps from guess to guess of the
picture, z_t - t v.
"""

from __future__ import annotations

from dcgen_convert.families.sana import Sana


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
    default_steps = 2

    def claims(self, config):
        return super().claims(config) and bool(config.get("guidance_embeds"))

    def shift(self, tokens, scheduler):
        """SANA's own: the pipeline's few angles are no noise levels to train at."""
        return 3.0

    def predict(self, model, z, t, text, guidance=None):
        return model(
            hidden_states=z,
            encoder_hidden_states=text["encoder_hidden_states"],
            encoder_attention_mask=text["encoder_attention_mask"],
            guidance=(guidance * model.config.guidance_embeds_scale).to(z.dtype),
            timestep=t.to(z.dtype),
            return_dict=False,
        )[0]

    def encode_text(self, pipeline, prompts, length):
        embeds, mask = pipeline.encode_prompt(
            prompt=prompts, max_sequence_length=length, complex_human_instruction=None
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def pipeline_call(self, pipeline, prompts, *, height, width, steps, guidance, length):
        call = super().pipeline_call(
            pipeline, prompts, height=height, width=width, steps=steps, guidance=guidance, length=length
        )
        return (
            call if steps == 2 else {**call, "intermediate_timesteps": None}
        )  # the default is for two steps and refused with others
