"""What the tiny pipelines are put together from: text encoders, tokenizers, an AutoencoderKL, random weights that are
alive; and what the tests of every family look at them through.
"""

from __future__ import annotations

from importlib import import_module

import diffusers
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    T5Config,
    T5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dcgen_convert.core.pixels import to_image
from dcgen_convert.families import COMPONENTS
from dcgen_convert.families.base import reference_keys
from dcgen_convert.families.qwenimage_edit import QwenImageEdit, QwenImageEditPlus
from dcgen_convert.networks import pipelines
from dcgen_convert.networks.processors import for_pictures

IMAGE = "<|image_pad|>"  # Qwen's mark of where a picture stands
WIDTH = 16  # of every text encoder
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
DECODER = dict(
    vocab_size=300,
    hidden_size=WIDTH,
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


def kl(channels: int, **options) -> diffusers.AutoencoderKL:
    """AutoencoderKL f8."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=channels,
        mid_block_add_attention=False,
        **options,
    )


def alive(model: torch.nn.Module) -> torch.nn.Module:
    """Every vector of the model away from its neutral start: no bias of zero, no norm weight of one, no closed gate."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.abs().max():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def t5() -> T5EncoderModel:
    torch.manual_seed(1)
    return T5EncoderModel(T5Config(vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def clip_projection(seed: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=WIDTH // 2,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=WIDTH // 2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config).eval()


def flow(**options) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def byte_tokenizer(**options) -> Qwen2Tokenizer:
    """Byte-level tokenizer without merges, with the chat marks of Qwen."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {piece: i for i, piece in enumerate([*marks, *bytes_to_unicode().values()])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", **options)
    seen = ["<|vision_start|>", "<|vision_end|>", IMAGE, "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks[1:], *seen]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    return tokenizer


def picture_processor(tokenizer: Qwen2Tokenizer):
    """The processor of Qwen2-VL without its half for videos."""
    return for_pictures()(image_processor=Qwen2VLImageProcessorPil(), tokenizer=tokenizer)


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """As GLM-4's: two marks before every text, padding on the left."""
    inner = byte_tokenizer().backend_tokenizer
    marks = [(mark, inner.token_to_id(mark)) for mark in ("<|im_start|>", "<|im_end|>")]
    inner.post_processor = TemplateProcessing(single="<|im_start|> <|im_end|> $A", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|endoftext|>", padding_side="left")


def network_of(pipeline):
    """What is converted: the stock pipeline's `transformer` or `unet`."""
    return next(pipeline.components[name] for name in COMPONENTS if name in pipeline.components)


def keep_states(pipeline, states, steps=None):
    """Let the scheduler note what every step receives, (output, timestep, sample), and the state that it returns."""
    original = pipeline.scheduler.step

    def record(model_output, timestep, sample, *args, **kwargs):
        result = original(model_output, timestep, sample, *args, **kwargs)
        states.append((result[0] if isinstance(result, tuple) else result.prev_sample).clone())
        if steps is not None:
            steps.append((model_output.clone(), torch.as_tensor(timestep).float(), sample.clone()))
        return result

    pipeline.scheduler.step = record


def reference_pixels(sizes):
    """Pictures of 8 bits, one for each (height, width) of ``sizes``: (3, height, width) in [-1, 1]."""
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(256, (3, *size), generator=generator) / 127.5 - 1 for size in sizes]


def encoded(entry, family, pipeline, prompts):
    """The conditions of prompts, whose references are the entry's pictures."""
    seen = [to_image(pixels) for pixels in reference_pixels(entry.references)]
    return pipelines.encode_text(family, pipeline, prompts, entry.length, [seen] * len(prompts))


def reference_latents(sizes, channels, rows=1, grid=None):
    """Random latents of references by their keys, (rows, channels, 1, 3 + number) each, or (rows, channels, *grid)."""
    generator = torch.Generator().manual_seed(6)
    return {
        key: torch.randn(rows, channels, *(grid or (1, 3 + number)), generator=generator)
        for number, key in enumerate(reference_keys(len(sizes)))
    }


SMALLER = 16  # times fewer px
REAL = {  # what the pipelines ask for the size of a reference
    name: import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}").calculate_dimensions
    for name in ("edit", "edit_plus")
}


def small_references(patch):
    """The pipelines of Qwen-Image-Edit give every reference an area of a megapixel: here a 16th of it, 256 x 256."""
    for name, real in REAL.items():
        module = import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}")
        patch.setattr(module, "calculate_dimensions", lambda area, ratio, real=real: real(area / SMALLER, ratio))
    for family, seen in ((QwenImageEdit, 1024), (QwenImageEditPlus, 384)):
        patch.setattr(family, "reference_side", int(1024 / SMALLER**0.5))
        patch.setattr(family, "seen_side", int(seen / SMALLER**0.5))


class Pairs:
    """Rows of both latent spaces as `LatentCache` gives them: random, which is all that linear algebra asks for."""

    def __init__(self, base, deep, count, references=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(9)
        names = ["z", *reference_keys(references)]
        self.rows = [
            {name: (torch.randn(count, *shape, generator=generator) + 0.3).to(dtype) for name in names}
            for shape in (base, deep)
        ]
        self.spans = [range(count)]

    def __len__(self):
        return self.spans[0].stop

    def pairs(self, indices):
        return tuple({name: value[indices] for name, value in side.items()} for side in self.rows)


def qwen_vae() -> diffusers.AutoencoderKLQwenImage:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def flux2_transformer(**options) -> diffusers.Flux2Transformer2DModel:
    torch.manual_seed(2)
    model = diffusers.Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **options,
    )
    return alive(model)


def flux2_vae(**options) -> diffusers.AutoencoderKLFlux2:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        **options,
    )
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def trigflow(family):
    """The family's velocity as the derivative along TrigFlow's angle (arXiv 2410.11081), of states of deviation 1: at
    the angle a, t = sin a / (sin a + cos a), x = cos a z_0 + sin a eps is z_t / n with n = sqrt(t^2 + (1 - t)^2), and
    the guess of the picture
    is the same, cos a x - sin a F = z_t - t v."""

    def derivative(model, z, t, text, guidance):
        n = (t.square() + (1 - t).square()).sqrt()
        x, cos, sin = z / n, (1 - t) / n, t / n
        return (cos * x - (z - t * family.velocity(model, z, t, text, guidance))) / sin

    return derivative
