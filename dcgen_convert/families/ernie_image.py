"""ERNIE-Image: `ErnieImageTransformer2DModel`, one stream on FLUX.2's latents, with one modulation for all blocks.

The pipeline packs 2 x 2 cells into the channels of a map before the network sees them. Inside the network the tokens
are the first axis of a sequence and the rows of a batch the second: (N + L, B, D).

Its pipeline adds 1e-5 to the variances of the autoencoder's statistics, whatever their config says (the published one
says 1e-4, which is what the latents here are made with). The two differ by less than a ten-thousandth.

Source: diffusers 0.42 pipeline_ernie_image.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import padded

if TYPE_CHECKING:
    from torch import Tensor


class ErnieImage(Family):
    name = "ernie-image"
    model_class = "ErnieImageTransformer2DModel"
    single_file = True
    pipeline_class = "ErnieImagePipeline"
    embedder = "x_embedder.proj"
    head = "final_linear"
    in_order = out_order = "c p1 p2"
    guidance = "cfg"
    layouts = {"diffusers": ("text_proj.", "layers.0.adaLN_sa_ln.", "final_linear.")}
    text_keys = ("encoder_hidden_states", "text_mask")
    blocks = ("layers",)
    # All blocks use one modulation, which lies outside them.
    lora_targets = r"layers\.\d+\.(self_attention\.(to_q|to_k|to_v|to_out\.0)|mlp\.(gate_proj|up_proj|linear_fc2))"
    bundle_tier = 2
    default_px = 1024
    idle = ("pe", "pe_tokenizer")
    length_argument = ""
    fixed_arguments = {"use_pe": False}  # else a language model writes another prompt
    default_steps = 50
    default_guidance = 4.0
    text_length = 512

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return 1024**2  # what the pipeline draws when it is told no size

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        return {**config, "in_channels": channels, "out_channels": channels, "patch_size": 1}

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"latent_batch_norm": True}

    def text_width(self, config: dict[str, Any]) -> int:
        return config["text_in_dim"]

    def doubt(self, name: str, scheduler: Mapping[str, Any]) -> str | None:
        if "turbo" not in name.lower():  # no config tells the two published models apart
            return None
        return (
            f"{name} may be ERNIE-Image-Turbo (its name says turbo): it was distilled to 8 steps, which flow matching "
            "alone undoes (--recipe few-steps); baidu/ERNIE-Image is the undistilled model"
        )

    def image_tokens(self, features: Any, count: int, text: Text) -> Tensor:
        return features[:count].transpose(0, 1)  # (N + L, B, D), the image before the text

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        patch, sides = self.patch(model.config, z.shape[1]), z.shape[2:]
        grid = self.grid(sides, patch)
        output = model(
            hidden_states=self.untokens(self.tokens(z, patch), grid, 1),  # (B, C p p, h / p, w / p)
            timestep=(t * 1000).to(z.dtype),
            text_bth=text["encoder_hidden_states"],
            text_lens=text["text_mask"].long().sum(1),
            return_dict=False,
        )[0]
        return self.untokens(self.tokens(output, 1), sides, patch)

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        """The pipeline has no length of its own: what comes after ``length`` tokens is left out."""
        rows = pipeline.encode_prompt(prompts, pipeline.text_encoder.device)
        embeds, mask = padded([row[:length] for row in rows], length)
        return {"encoder_hidden_states": embeds, "text_mask": mask}
