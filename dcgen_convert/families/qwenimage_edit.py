"""Qwen-Image-Edit, which edits a picture by an instruction: the network of Qwen-Image with references.

The references follow the target in the token sequence, each on a grid of its own. The text encoder, Qwen2.5-VL, sees
them too. Source: diffusers 0.42 pipeline_qwenimage_edit.py and pipeline_qwenimage_edit_plus.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dcgen_convert.core.pixels import to_image
from dcgen_convert.families.base import Network, Pipeline, Text, references_of
from dcgen_convert.families.qwenimage import QwenImage
from dcgen_convert.families.tensors import padded

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

STEP = 32  # px: both sides of a picture that the pipelines have resized are multiples of it


class QwenImageEdit(QwenImage):
    name = "qwenimage-edit"
    pipeline_class = "QwenImageEditPipeline"
    told_by_pipeline = True  # its config is the one of Qwen-Image, but for the zero_cond_t of some
    references = 1
    shared_references = True
    reference_side = 1024
    seen_side: ClassVar[int] = 1024  # as `reference_side`: of what the text encoder sees
    picture_tokens = 1408  # one for 28 x 28 px: 1,369 of a square, at most 1,407 up to 1 : 4
    layouts = {}  # the tensor names are those of Qwen-Image too
    recipe = "qwen-image-edit"
    # As published: the text's MLP is left as it is.
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|img_mlp\.net\.(0\.proj|2))"
    )
    default_cells = None
    default_px = 1024  # the area that it draws without a size, in the shape of its reference
    text_length = 256

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        import torch

        patch, pictures = self.patch(model.config, z.shape[1]), (z, *references_of(text))
        tokens = [self.tokens(picture, patch) for picture in pictures]  # (B, N, C p p), then (B, M, C p p) each
        grids = [(1, picture.shape[2] // patch, picture.shape[3] // patch) for picture in pictures]
        output = model(
            hidden_states=torch.cat(tokens, dim=1),
            timestep=t.to(z.dtype),
            img_shapes=[grids] * len(z),
            return_dict=False,
            **{key: text[key] for key in self.text_keys},
        )[0]
        return self.untokens(output[:, : tokens[0].shape[1]], z.shape[2:], patch)

    def guided(self, v: Tensor, v_0: Tensor, guidance: float) -> Tensor:
        """Each token of the result has the norm that it has without guidance; a token is a cell here, (B, C, h, w)."""
        both = super().guided(v, v_0, guidance)
        return both * (v.norm(dim=1, keepdim=True) / both.norm(dim=1, keepdim=True))

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        raise TypeError(f"the text encoder of {self.name} sees the references: encode_seen")

    def encode_seen(
        self, pipeline: Pipeline, prompts: list[str], length: int, pictures: Sequence[Sequence[Image]]
    ) -> Text:
        rows, length = [], self.condition_length(length)
        for prompt, given in zip(prompts, pictures, strict=True):
            seen = [_resized(picture, self.seen_side) for picture in given]
            embeds, _ = pipeline.encode_prompt([prompt], image=seen)  # (1, L, D); the mask of one prompt is all ones
            rows.append(embeds[0, :length])
        embeds, mask = padded(rows, length)
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}

    def reference_call(self, pixels: Sequence[Tensor]) -> dict[str, Any]:
        """PIL images, which the pipelines ask for their size; of one prompt."""
        super().reference_call(pixels)  # the right number of them
        return {"image": to_image(pixels[0][0])}


class QwenImageEditPlus(QwenImageEdit):
    """2509 and 2511: up to three references, of which the text encoder sees less.

    With the config's zero_cond_t (2511) the network itself modulates the references' tokens as those of t = 0.
    """

    name = "qwenimage-edit-plus"
    pipeline_class = "QwenImageEditPlusPipeline"
    references = 3
    seen_side = 384
    picture_tokens = 224  # one for 28 x 28 px: at most 210 up to 1 : 4; and the words before each: "Picture 1: "

    def reference_call(self, pixels: Sequence[Tensor]) -> dict[str, Any]:
        super().reference_call(pixels)
        return {"image": [to_image(picture[0]) for picture in pixels]}


def _resized(picture: Image, side: int) -> Image:
    """The picture with about the area of a square of ``side`` px, as diffusers' `calculate_dimensions` has it."""
    from PIL import Image

    return picture.resize(resized_size(picture.width, picture.height, side), Image.Resampling.LANCZOS)


def resized_size(width: float, height: float, side: int) -> tuple[int, int]:
    """(width, height) in px of the same shape, with about the area of a square of ``side`` px."""
    ratio = width / height
    wide = math.sqrt(side**2 * ratio)
    return round(wide / STEP) * STEP, round(wide / ratio / STEP) * STEP
