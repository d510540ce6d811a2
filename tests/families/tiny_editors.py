"""Tiny random pipelines of Qwen-Image and FLUX.2, which draw and edit: builders for `tiny_models.TINY`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .tiny_parts import (
    DECODER,
    IMAGE,
    ROPE,
    WIDTH,
    alive,
    byte_tokenizer,
    flow,
    flux2_transformer,
    flux2_vae,
    picture_processor,
    qwen_vae,
)


def qwen_parts(**config: Any) -> dict[str, Any]:
    """What the pipelines of Qwen-Image are made of; ``config`` of the transformer."""
    torch.manual_seed(2)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        **config,
    )
    text = dict(DECODER, num_hidden_layers=2, rope_parameters=ROPE)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH)
    tokenizer = byte_tokenizer()
    return dict(
        transformer=alive(transformer),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192),
        vae=qwen_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=text, vision_config=vision, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE)
            )
        ),
        tokenizer=tokenizer,
    )


def qwenimage(folder: Path) -> None:
    diffusers.QwenImagePipeline(**qwen_parts()).save_pretrained(folder)


def qwenimage_edit(folder: Path) -> None:
    parts = qwen_parts()
    processor = picture_processor(parts["tokenizer"])
    diffusers.QwenImageEditPipeline(**parts, processor=processor).save_pretrained(folder)


def qwenimage_edit_plus(folder: Path) -> None:
    parts = qwen_parts(zero_cond_t=True)  # as 2511
    processor = picture_processor(parts["tokenizer"])
    diffusers.QwenImageEditPlusPipeline(**parts, processor=processor).save_pretrained(folder)


def flux2_dev(folder: Path) -> None:
    text = dict(DECODER, num_hidden_layers=31, model_type="mistral")
    vision = dict(
        model_type="pixtral",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
    )
    tokenizer = byte_tokenizer()  # the real one is a processor of pictures too, which text does not need
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>"
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}"
    )
    diffusers.Flux2Pipeline(
        transformer=flux2_transformer(guidance_embeds=True),
        scheduler=flow(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def flux2_klein(folder: Path) -> None:
    diffusers.Flux2KleinPipeline(
        transformer=flux2_transformer(guidance_embeds=False),
        scheduler=flow(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**DECODER, num_hidden_layers=28)),
        tokenizer=byte_tokenizer(),
    ).save_pretrained(folder)
