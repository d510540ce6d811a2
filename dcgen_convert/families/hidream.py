"""HiDream-I1: `HiDreamImageTransformer2DModel`, whose pipeline negates what the network predicts. Source: diffusers
0.42
pipeline_hidream_image.py."""

from __future__ import annotations

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import Family, linear_mu

CELLS = 128  # side of the latent grid, in cells of the pipeline, whose area every picture is scaled to


class HiDream(Family):
    name = "hidream"
    model_class = "HiDreamImageTransformer2DModel"
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
    any_shape = False  # it scales every picture to one area
    default_steps = 50
    default_guidance = 5.0
    text_length = 128

    def text_width(self, config):
        t5, llama = config["caption_channels"]
        return t5 + (max(config["llama_layers"]) + 1) * llama

    def pack(self, config):
        return config["patch_size"]

    def only_side(self, config, cell):
        return CELLS * cell

    def convert_config(self, config, factor, channels, side):
        """The patch follows from the size: the stock pipeline draws on a grid as large as CELLS x CELLS, whatever is
        asked.
        """
        patch = CELLS * factor // side
        if patch < 1 or CELLS * factor % side or patch & (patch - 1) or channels % patch**2:
            raise InputError(
                f"HiDream's pipeline draws on {CELLS} x {CELLS} cells, which are no {side} px with {channels} "
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

    def mu(self, tokens, scheduler):
        return linear_mu(tokens, {})  # the pipeline asks the transformer's max_resolution, not the scheduler's config

    def image_tokens(self, features, count, text):
        """The picture comes first, and apart from the text in blocks of two streams; what follows it is padding or
        text.
        """
        return (features[0] if isinstance(features, tuple) else features)[:, :count]

    def predict(self, model, z, t, text, guidance=None):
        for module in model.modules():
            if type(module).__name__ == "MOEFeedForwardSwiGLU":
                # In inference mode the routed experts run without gradients; in training mode they compute the same.
                module.training, module._force_inference_output = True, False
        output = model(
            hidden_states=self.expose(z, model.config),
            timesteps=(t * 1000).to(z.dtype),
            encoder_hidden_states_t5=text["encoder_hidden_states_t5"],
            encoder_hidden_states_llama3=text["encoder_hidden_states_llama3"].transpose(0, 1),
            pooled_embeds=text["pooled_embeds"],
            return_dict=False,
        )[0]
        return self.collect(output, z.shape[1])

    def encode_text(self, pipeline, prompts, length):
        """Llama's hidden states of all layers are (B, layers, L, D): 33 MB a prompt in HiDream-I1, see
        `latents.text`.
        """
        t5, _, llama, _, pooled, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {
            "encoder_hidden_states_t5": t5,
            "encoder_hidden_states_llama3": llama.transpose(0, 1),
            "pooled_embeds": pooled,
        }
