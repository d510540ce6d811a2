"""Z-Image: `ZImageTransformer2DModel`. It predicts z_0 - eps at the time 1 - t.

Source: diffusers 0.42 pipeline_z_image.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import padded

if TYPE_CHECKING:
    from torch import Tensor


class ZImage(Family):
    name = "zimage"
    model_class = "ZImageTransformer2DModel"
    single_file = True
    pipeline_class = "ZImagePipeline"
    embedder = "all_x_embedder.2-1"
    head = "all_final_layer.2-1.linear"
    in_order = out_order = "p1 p2 c"
    guidance = "cfg"
    prediction = "reversed"
    layouts = {
        "diffusers": ("all_x_embedder.", "cap_pad_token"),
        "original": ("x_embedder.", "cap_pad_token", "x_pad_token"),
    }
    text_keys = ("encoder_hidden_states", "encoder_attention_mask")
    blocks = ("noise_refiner", "layers")
    lora_targets = r"(noise_refiner|layers)\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123])"
    awq_pattern = r"(noise_refiner|layers)\.\d+\.adaLN_modulation\.0"
    bundle_tier = 2
    default_px = 1024
    default_steps = 50
    default_guidance = 5.0
    text_length = 512

    def patch(self, config: dict[str, Any], channels: int) -> int:
        return super().patch({"in_channels": config["in_channels"], "patch_size": 2}, channels)

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return 2048**2  # "512 x 512 to 2048 x 2048", as its authors say

    def least_pixels(self, config: dict[str, Any]) -> int | None:
        return 512**2

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        if list(config.get("all_patch_size", (2,))) != [2] or list(config.get("all_f_patch_size", (1,))) != [1]:
            raise InputError("this Z-Image model has other patch sizes than 2 x 2, which its stock pipeline cannot run")
        return {**config, "in_channels": channels // 4}  # one deep latent cell is 2 x 2 cells of the adapter's grid

    def doubt(self, name: str, scheduler: Mapping[str, Any]) -> str | None:
        # The two published models differ only in the scheduler: Z-Image has shift 6, Z-Image-Turbo has shift 3.
        signs = ["its name says turbo"] if "turbo" in name.lower() else []
        signs += ["its scheduler's shift is 3, Z-Image's is 6"] if scheduler.get("shift") == 3 else []
        if not signs:
            return None
        return (
            f"{name} may be Z-Image-Turbo ({' and '.join(signs)}): it was distilled to 8 steps without guidance, which "
            "flow matching alone undoes (--recipe few-steps); Tongyi-MAI/Z-Image is the undistilled model"
        )

    def image_tokens(self, features: Any, count: int, text: Text) -> Tensor:
        return features[:, :count]  # the image tokens come first, their padding and the caption follow

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        import torch

        lengths = text["encoder_attention_mask"].long().sum(1).tolist()  # of all pictures at once: the host waits
        captions = [row[:length] for row, length in zip(text["encoder_hidden_states"], lengths, strict=True)]
        frames = list(self.expose(z, model.config).unsqueeze(2))  # B of (C / 4, 1, 2 h, 2 w)
        output = model(frames, (1 - t).to(z.dtype), captions, return_dict=False)[0]
        return self.collect(torch.stack(output).squeeze(2), z.shape[1])

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        rows, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
        embeds, mask = padded(rows, length)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
