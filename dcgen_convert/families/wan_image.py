"""Wan 2.1 from a picture and text: the network of Wan, which reads more channels and the tokens of an image encoder.

The reference is the first frame. The embedder reads the noised latent, a mask, and the latent of a video that begins
with the reference and is grey after it. Source: diffusers 0.42 pipeline_wan_i2v.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.pixels import to_image
from dcgen_convert.families.base import Pipeline, Text, references_of
from dcgen_convert.families.cleaning import require_ftfy
from dcgen_convert.families.wan import Wan

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MASK = 4  # channels of the mask: a number for each frame of a latent frame, 1 where the frame is given
WORDS = 512  # text tokens, by which the attention of diffusers tells them from those of the picture


class WanImage(Wan):
    name = "wan-image"
    pipeline_class = "WanImageToVideoPipeline"
    references = 1
    shared_references = True
    reference_channels = True
    mask_of_frames = True
    picture_tokens = 257  # of the image encoder
    layouts = {"diffusers": ("patch_embedding.", "condition_embedder.image_embedder.", "blocks.0.attn2.")}
    text_keys: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "encoder_hidden_states_image")

    def claims(self, config: Mapping[str, Any]) -> bool:
        # One with pos_embed_seq_len is given the last frame too. That of Wan 2.2 has no image encoder.
        written = config.get("out_channels") or 0
        return (
            config.get("_class_name") == self.model_class
            and config.get("in_channels") == 2 * written + MASK
            and bool(config.get("image_dim")) == bool(self.picture_tokens)
            and not config.get("pos_embed_seq_len")
        )

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        plain = super().convert_config(config, factor, channels, side)
        return {**plain, "in_channels": 2 * channels + MASK}

    def vae_config(self, config: dict[str, Any]) -> dict[str, Any]:
        return {"first_alone": True}  # as `reference_video` repeats the reference

    def inputs(self, z: Tensor, text: Text) -> Tensor:
        import torch

        mask = z.new_zeros(len(z), MASK, *z.shape[2:])
        mask[:, :, 0] = 1  # the first latent frame is of the reference alone
        return torch.cat([z, mask, references_of(text)[0].to(z.dtype)], dim=1)

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        raise TypeError(f"an encoder of {self.name} sees the references: encode_seen")

    def encode_seen(
        self, pipeline: Pipeline, prompts: list[str], length: int, pictures: Sequence[Sequence[Image]]
    ) -> Text:
        require_ftfy(self.pipeline_class)
        if length != WORDS:
            raise InputError(
                f"the attention of a {self.name} network takes {WORDS} text tokens, not {length}",
                f"--set latents.text_length={WORDS}",
            )
        words = super().encode_text(pipeline, prompts, length)
        return {**words, "encoder_hidden_states_image": pipeline.encode_image([given[0] for given in pictures])}

    def reference_call(self, pixels: Sequence[Tensor]) -> dict[str, Any]:
        """A PIL image, which the image encoder takes; the pipeline gives it to every prompt of a call."""
        super().reference_call(pixels)
        return {"image": to_image(pixels[0][0])}

    def reference_video(self, pixels: Tensor, frames: int, first: int) -> Tensor:
        """The reference in all frames of the first latent frame, 1 of Wan's own autoencoder, and grey after it."""
        import torch

        grey = pixels.new_zeros(*pixels.shape[:2], frames - first, *pixels.shape[2:])
        return torch.cat([pixels.unsqueeze(2).repeat_interleave(first, dim=2), grey], dim=2)
