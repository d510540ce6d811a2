"""HiDream-I1: `HiDreamImageTransformer2DModel`. Its pipeline negates the prediction of the network.

Source: diffusers 0.42 pipeline_hidream_image.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import Family, Network, Pipeline, Text
from dcgen_convert.families.shifts import linear_mu

if TYPE_CHECKING:
    from torch import Tensor

CELLS = 128  # the pipeline scales every picture to the area of CELLS x CELLS latent cells


class HiDream(Family):
    name = "hidream"
    model_class = "HiDreamImageTransformer2DModel"
    single_file = True
    pipeline_class = "HiDreamImagePipeline"
    embedder = "x_embedder.proj"
    head = "final_layer.linear"
    in_order = out_order = "p1 p2 c"
    guidance = "cfg"
    prediction = "reversed"
    layouts = {"diffusers": ("double_stream_blocks.0.block.", "caption_projection.")}
    text_keys = ("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds")
    blocks = ("double_stream_blocks", "single_stream_blocks")
    lora_targets = (
        r"(double|single)_stream_blocks\.\d+\.block\."
        r"(attn1\.to_(q|k|v|out)(_t)?|ff_i\.(shared_experts\.|experts\.\d+\.)?w[123]|ff_t\.w[123])"
    )
    awq_pattern = r"(double|single)_stream_blocks\.\d+\.block\.adaLN_modulation\.1"
    bundle_tier = 2
    any_shape = False  # the pipeline scales every picture to one area
    default_cells = 128
    default_steps = 50
    default_guidance = 5.0
    text_length = 128

    def text_width(self, config: dict[str, Any]) -> int:
        t5, llama = config["caption_channels"]
        return t5 + (max(config["llama_layers"]) + 1) * llama

    def pack(self, config: dict[str, Any]) -> int:
        return config["patch_size"]

    def only_side(self, config: dict[str, Any], cell: int) -> int | None:
        return CELLS * cell

    def most_pixels(self, config: dict[str, Any]) -> int | None:
        return (8 * CELLS) ** 2

    def convert_config(self, config: dict[str, Any], factor: int, channels: int, side: int) -> dict[str, Any]:
        """The patch follows from ``side``, because the stock pipeline always draws on a grid of CELLS x CELLS."""
        patch = CELLS * factor // side
        if patch < 1 or CELLS * factor % side or patch & (patch - 1) or channels % patch**2:
            raise InputError(
                f"HiDream's pipeline draws on {CELLS} x {CELLS} cells: they cannot make {side} px from {channels} "
                f"channels at f{factor}",
                "set --resolution to one of "
                f"{', '.join(str(CELLS * factor >> k) for k in range(5) if channels % 4**k == 0)}",
            )
        fine = channels // patch**2
        return {
            **config,
            "in_channels": fine,
            "out_channels": fine,
            "patch_size": patch,
            "max_resolution": [CELLS, CELLS],
        }

    def mu(self, tokens: int, scheduler: dict[str, Any]) -> float:
        return linear_mu(tokens, {})  # the pipeline does not read the scheduler's config for it

    def image_tokens(self, features: Any, count: int, text: Text) -> Tensor:
        """The image tokens come first. Padding or text follows them in blocks with one stream."""
        return (features[0] if isinstance(features, tuple) else features)[:, :count]

    def predict(self, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        for module in model.modules():
            if type(module).__name__ == "MOEFeedForwardSwiGLU":
                # In inference mode the routed experts run without gradients. Training mode computes the same values.
                module.training = True
                module._force_inference_output = False  # noqa: SLF001  diffusers has no public setting for it
        output = model(
            hidden_states=self.expose(z, model.config),
            timesteps=(t * 1000).to(z.dtype),
            encoder_hidden_states_t5=text["encoder_hidden_states_t5"],
            encoder_hidden_states_llama3=text["encoder_hidden_states_llama3"].transpose(0, 1),
            pooled_embeds=text["pooled_embeds"],
            return_dict=False,
        )[0]
        return self.collect(output, z.shape[1])

    def encode_text(self, pipeline: Pipeline, prompts: list[str], length: int) -> Text:
        """Llama's hidden states of all layers are (B, layers, L, D): 33 MB per prompt in HiDream-I1. The setting
        `latents.text` says whether they are stored.
        """
        t5, _, llama, _, pooled, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {
            "encoder_hidden_states_t5": t5,
            "encoder_hidden_states_llama3": llama.transpose(0, 1),
            "pooled_embeds": pooled,
        }
