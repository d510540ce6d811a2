"""Stable Diffusion 1.5, experimental: `UNet2DConditionModel`. It predicts epsilon.

conv_in is the embedder and conv_out is the head. Both are 3 x 3 convolutions with padding 1, so they are linear in
the 3 x 3 neighbourhoods of a map. (A transformer's embedder and head are linear in patches and tokens.) A token is one
cell of the latent.

Source: diffusers 0.42 pipeline_stable_diffusion.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from dcgen_convert.core.errors import InputError
from dcgen_convert.families import ddpm
from dcgen_convert.families.base import Family, Network, Pipeline, Text

if TYPE_CHECKING:
    from torch import Tensor

KERNEL = 3  # of conv_in and conv_out
PLAIN: dict[str, object] = {  # config values of a network whose only inputs are latent, time and text
    "class_embed_type": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "num_class_embeds": None,
    "conv_in_kernel": KERNEL,
    "conv_out_kernel": KERNEL,
}
FIRST, LAST, _ = ddpm.SCALED_LINEAR
SCHEDULE: dict[str, tuple[Any, Any]] = {  # key of a scheduler config -> (required value, default of diffusers)
    "prediction_type": ("epsilon", "epsilon"),
    "beta_schedule": ("scaled_linear", "linear"),
    "beta_start": (FIRST, 1e-4),
    "beta_end": (LAST, 0.02),
    "num_train_timesteps": (ddpm.TRAIN_STEPS, ddpm.TRAIN_STEPS),
    "trained_betas": (None, None),
    "rescale_betas_zero_snr": (False, False),
}


class UNet(Family):
    name = "unet"
    model_class = "UNet2DConditionModel"
    single_file = True
    component = "unet"
    experimental = (
        "converting a U-Net is experimental: the method was published for diffusion transformers, and only a miniature "
        "was tried"
    )
    pipeline_class = "StableDiffusionPipeline"
    plain: ClassVar[Mapping[str, object]] = PLAIN
    embedder = "conv_in"
    head = "conv_out"
    in_order = "c p1 p2"
    out_order = "c p1 p2"
    guidance = "cfg"
    prediction = "epsilon"
    layouts = {
        "diffusers": ("conv_in.", "conv_out.", "mid_block.attentions.0.transformer_blocks.0.attn2."),
        "original": ("input_blocks.0.0.", "middle_block.1.transformer_blocks.0.attn2.", "output_blocks."),
    }
    text_keys: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    blocks = ("down_blocks", "mid_block", "up_blocks")
    lora_targets = (
        r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
        r"((attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))|resnets\.\d+\.(conv1|conv2|conv_shortcut))"
    )
    dense_pattern = r".*\.time_emb_proj"
    unquantised = ": `nunchaku_lite` and `bfl` of diffusers were tried with transformers only"
    bundle_tier = 2  # the pipeline passes a generator to the decoder, which AutoencoderDC does not accept
    recipe = "sd-1.5"
    length_argument = ""
    default_steps = 50
    default_guidance = 7.5
    text_length = 77

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        plain = self.plain.items()
        odd = next((f"{key} {config[key]}" for key, value in plain if config.get(key, value) != value), None)
        if odd or config["in_channels"] != config["out_channels"]:
            raise InputError(
                f"this U-Net has {odd or 'more channels in than out'}: it is conditioned on more than time and text",
                "give a text-to-image U-Net of the Stable Diffusion 1.5 or XL kind",
            )
        # If the config names an early version of diffusers, the pipeline takes a small sample_size for a mistake of
        # that version and replaces it.
        config = {key: value for key, value in config.items() if key != "_diffusers_version"}
        return {**config, "in_channels": channels, "out_channels": channels, "sample_size": side // factor}

    def pack(self, config: dict[str, Any]) -> int:
        return 1

    def patch(self, config: dict[str, Any], channels: int) -> int:
        return 1

    def tokens(self, z: Tensor, patch: int) -> Tensor:
        return neighbourhoods(z)

    def image_tokens(self, features: Any, count: int, text: Text) -> Tensor:
        return features.flatten(2).transpose(1, 2)

    def head_inputs(self, features: Any, count: int, text: Text) -> Tensor:
        return neighbourhoods(features)

    def block_map(self, output: Any, grid: tuple[int, ...], text: Text) -> Tensor:
        # Down blocks return a tuple: their output, and the tensors of the skip connections.
        return output[0] if isinstance(output, tuple) else output

    def token_fraction(self, name: str, config: dict[str, Any]) -> float:
        """Each level has a quarter of the cells of the level above it.

        A downsampler runs on the coarser of its two grids, an upsampler on the finer one.
        """
        levels = len(config["down_block_types"])
        place, _, rest = name.partition(".")
        number = int(rest.partition(".")[0]) if place in ("down_blocks", "up_blocks") else 0
        level = {"down_blocks": number, "mid_block": levels - 1, "up_blocks": levels - 1 - number}.get(place, 0)
        level += ".downsamplers." in name
        level -= ".upsamplers." in name
        return 0.25**level

    def text_width(self, config: dict[str, Any]) -> int:
        return config["cross_attention_dim"]

    def grid_step(self, config: dict[str, Any]) -> int:
        return 2 ** (len(config["down_block_types"]) - 1)

    def check_scheduler(self, scheduler: dict[str, Any]) -> None:
        for key, (wanted, default) in SCHEDULE.items():
            found = scheduler.get(key, default)
            same = math.isclose(found, wanted, rel_tol=1e-6) if isinstance(found, float) else found == wanted
            if not same:
                raise InputError(
                    f"the scheduler of this U-Net has {key} {found}, only {wanted} can be converted",
                    "give a model of the Stable Diffusion 1.5 or XL kind",
                )

    def noise_times(self) -> Tensor:
        return ddpm.noise_times(ddpm.SCALED_LINEAR)

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """epsilon at z_t."""
        return model(ddpm.network_input(z, t), ddpm.step_at(t, ddpm.SCALED_LINEAR), return_dict=False, **text)[0]

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        """The pipeline always pads to the length of its tokenizer; ``length`` is not used."""
        embeds, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}


def neighbourhoods(maps: Tensor) -> Tensor:
    """What a 3 x 3 convolution with padding 1 reads for each output: (B, C, h, w) -> (B, h w, 9 C).

    The 9 C numbers have the order of the convolution's flattened weight.
    """
    import torch.nn.functional as F

    return F.unfold(maps, KERNEL, padding=KERNEL // 2).transpose(1, 2)
