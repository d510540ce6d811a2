"""FLUX.2 dev and klein: `Flux2Transformer2DModel`. They draw from text alone, or from text and pictures.

References follow the target in the token sequence. All go through the same embedder; the first number of a position,
the time, tells them apart. Sources: diffusers 0.42 pipeline_flux2.py, pipeline_flux2_klein.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcgen_convert.core.pixels import to_image
from dcgen_convert.families.base import Family, Network, Pipeline, Text, references_of
from dcgen_convert.families.tensors import guidance_input

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

TIME_STEP = 10  # between the time of one picture and that of the next; the target has 0


class Flux2(Family):
    name = "flux2"
    model_class = "Flux2Transformer2DModel"
    single_file = True
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
    references = 6  # "recommended max" of dev, as its authors say; of klein 4
    optional_references = True
    shared_references = True
    experimental = (
        "FLUX.2 edits pictures too. Without references in its rows a conversion trains it to draw from text alone, so "
        "edits with the converted model are untested"
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

    def note(self, references: int = 0) -> str:
        return "" if references else self.experimental

    def image_tokens(self, features: Any, count: int, text: Text) -> Tensor:
        """Blocks with two streams return (text, image), blocks with one hold the text first; then come target and
        references.
        """
        if isinstance(features, tuple):
            return features[1][:, :count]
        words = text["encoder_hidden_states"].shape[1]
        return features[:, words : words + count]

    def head_inputs(self, features: Any, count: int, text: Text) -> Tensor:
        return features[:, :count]  # the text is cut off before

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        import torch

        patch, pictures = self.patch(model.config, z.shape[1]), (z, *references_of(text))
        tokens = [self.tokens(picture, patch) for picture in pictures]  # (B, N, C p p) and (B, M, C p p) each
        words = torch.arange(text["encoder_hidden_states"].shape[1], device=z.device)
        zero = torch.zeros(1, dtype=torch.long, device=z.device)
        output = model(
            hidden_states=torch.cat(tokens, dim=1),
            timestep=t.to(z.dtype),
            guidance=guidance_input(model, guidance, z),
            encoder_hidden_states=text["encoder_hidden_states"],
            img_ids=torch.cat([self._ids(picture, patch, turn * TIME_STEP) for turn, picture in enumerate(pictures)]),
            txt_ids=torch.cartesian_prod(zero, zero, zero, words),
            return_dict=False,
        )[0]
        return self.untokens(output[:, : tokens[0].shape[1]], z.shape[2:], patch)

    def _ids(self, picture: Tensor, patch: int, time: int) -> Tensor:
        """Positions (time, row, column, word) of a picture's tokens, (N, 4)."""
        import torch

        lengths = (time, time + 1), (0, picture.shape[2] // patch), (0, picture.shape[3] // patch), (0, 1)
        return torch.cartesian_prod(*(torch.arange(start, stop, device=picture.device) for start, stop in lengths))

    def reference_call(self, pixels: Sequence[Tensor]) -> dict[str, Any]:
        """A list of pictures, which the pipeline takes in 8 bits and gives to every prompt of a call."""
        super().reference_call(pixels)
        return {"image": [to_image(one[0]) for one in pixels]} if pixels else {}

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        return {"encoder_hidden_states": pipeline.encode_prompt(prompts, max_sequence_length=length)[0]}
