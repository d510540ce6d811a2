"""Wan 2.1 and Wan 2.2 TI2V, which draw videos from text: `WanTransformer3DModel`.

With `expand_timesteps` (Wan 2.2 TI2V) the stock pipeline gives a timestep to every 2 x 2 cells. When it draws from text
they are all t. So the network is given t once, here as in a bundle, whose tokens are single cells.
Source: diffusers 0.42 pipeline_wan.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import FPS_KEY, Family, Network, Pipeline, Text
from dcgen_convert.families.grid import Time

if TYPE_CHECKING:
    from torch import Tensor

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}  # of UniPC's config


class Wan(Family):
    name = "wan"
    axes = 3
    model_class = "WanTransformer3DModel"
    single_file = True
    pipeline_class = "WanPipeline"
    embedder = "patch_embedding"
    head = "proj_out"
    in_order = "c p0 p1 p2"
    out_order = "p0 p1 p2 c"
    guidance = "cfg"
    layouts = {"diffusers": ("patch_embedding.", "condition_embedder.text_embedder.", "blocks.0.attn2.")}
    text_keys: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    blocks = ("blocks",)
    # Without the cross-attention attn2, as its authors' LoRA for DC-AE-V.
    lora_targets = r"blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"
    dense_pattern = r"blocks\.\d+\.attn2\..*"
    bundle_tier = 3
    index_values = {"expand_timesteps": False}
    unquantised = ": `nunchaku_lite` of diffusers has no mapping for Wan, and `bfl` was tried with pictures only"
    recipe = "wan-1.3b-480p"
    time = Time(4, alone=True)
    second: ClassVar[str] = "transformer_2"  # of pipelines that draw with two networks
    default_frames = 80
    fps = 16
    default_px = 480
    default_width = 832
    shape = (9, 16)
    default_steps = 50
    default_guidance = 5.0
    text_length = 512

    def claims(self, config: Mapping[str, Any]) -> bool:
        # A network that is given a picture too reads further channels: see WanImage.
        return super().claims(config) and config.get("in_channels") == (
            config.get("out_channels") or config.get("in_channels")
        )

    def frames_per_second(self, index: Mapping[str, Any]) -> float:
        """Wan 2.2 TI2V, the only one with `expand_timesteps`, draws 24."""
        return super().frames_per_second({FPS_KEY: 24, **index} if index.get("expand_timesteps") else index)

    def belongs(self, index: Mapping[str, Any]) -> bool:
        return super().belongs(index) and any(index.get(self.second) or ()) == bool(self.further)

    def patch(self, config: dict[str, Any], channels: int) -> int:
        frames, rows, columns = config["patch_size"]
        if frames != 1 or rows != columns:
            raise InputError(
                f"this {self.name} model has patches of {frames} x {rows} x {columns} cells",
                "give one of 1 x p x p cells",
            )
        return int(rows)

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        return {**config, "in_channels": channels, "out_channels": channels, "patch_size": [1, 1, 1]}

    def text_width(self, config: dict[str, Any]) -> int:
        return config["text_dim"]

    def check_scheduler(self, scheduler: dict[str, Any]) -> None:
        name = str(scheduler.get("_class_name"))
        if name.startswith("FlowMatch") or all(scheduler.get(key) == value for key, value in FLOW.items()):
            return
        raise InputError(
            f"the scheduler of this {self.name} model, {name}, is set to another prediction or other noise levels than "
            "flow's",
            "give the scheduler that the model was published with, which has use_flow_sigmas",
        )

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        return model(
            hidden_states=self.inputs(z, text),
            timestep=t * 1000,  # in float32, as the pipeline gives it
            return_dict=False,
            **{key: text[key] for key in self.text_keys},
        )[0]

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        """Padded with zeros, which the network attends to: there is no mask."""
        embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
        return {"encoder_hidden_states": embeds}
