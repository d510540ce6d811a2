"""DiT-XL: `DiTTransformer2DModel`, conditioned on classes. It predicts epsilon and a learned sigma.

Source: diffusers 0.42 pipeline_dit.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from dcgen_convert.core.errors import InputError
from dcgen_convert.families import ddpm
from dcgen_convert.families.base import CallSettings, Family, Network, Pipeline, Text
from dcgen_convert.families.tensors import added_positions

if TYPE_CHECKING:
    from torch import Tensor

NULL_CLASS = 1000  # fixed in the code of the stock pipeline


class DiT(Family):
    name = "dit"
    model_class = "DiTTransformer2DModel"
    pipeline_class = "DiTPipeline"
    embedder = "pos_embed.proj"
    head = "proj_out_2"
    in_order = "c p1 p2"
    out_order = "p1 p2 c"
    guidance = "cfg"
    prediction = "epsilon"
    layouts = {
        "diffusers": ("proj_out_1.", "proj_out_2."),
        "original": ("y_embedder.embedding_table",),
    }
    text_keys = ("class_labels",)
    unused = ("pos_embed.pos_embed",)
    blocks = ("transformer_blocks",)
    lora_targets = r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
    awq_pattern = r"transformer_blocks\.\d+\.norm1\.linear"
    dense_pattern = r"transformer_blocks\.\d+\.norm1\.emb\..*"  # timestep MLPs
    bundle_tier = 0
    any_shape = False
    recipe = "dit-xl-512"
    default_steps = 50
    default_guidance = 4.0

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        return {
            **config,
            "in_channels": channels,
            "out_channels": 2 * channels,
            "patch_size": 1,
            "sample_size": side // factor,
        }

    def only_side(self, config: dict[str, Any], cell: int) -> int | None:
        return config["sample_size"] * cell if config.get("sample_size") else None  # a single file does not state it

    def position_term(self, model: Network, grid: tuple[int, ...]) -> Tensor | None:
        # The table is for one size. diffusers makes another one where the latent has another size.
        return added_positions(model.pos_embed, model.config.in_channels, grid)

    def noise_times(self) -> Tensor:
        return ddpm.noise_times(ddpm.LINEAR)

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """epsilon at z_t."""
        time = ddpm.step_at(t, ddpm.LINEAR)
        output = model(ddpm.network_input(z, t), timestep=time, class_labels=text["class_labels"], return_dict=False)[0]
        return output[:, : z.shape[1]]  # the rest is the learned sigma; the stock pipeline drops it too

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        import torch

        return {"class_labels": torch.tensor([class_of(pipeline, prompt) for prompt in prompts])}

    def pipeline_call(
        self, pipeline: Pipeline | None, prompts: list[str], **settings: Unpack[CallSettings]
    ) -> dict[str, Any]:
        return dict(
            class_labels=[class_of(pipeline, prompt) for prompt in prompts],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
        )


def class_of(pipeline: Pipeline, prompt: str) -> int:
    """Class index of a prompt: a number, "" (the null class), or a label of the checkpoint's id2label table."""
    if prompt == "":
        return NULL_CLASS
    if prompt.isdecimal() and int(prompt) <= NULL_CLASS:
        return int(prompt)
    if prompt in pipeline.labels:
        return int(pipeline.labels[prompt])
    raise InputError(
        f"the caption {prompt[:60]!r} is no class of the model",
        f"give a number below {NULL_CLASS}, or a label of its model_index.json",
    )
