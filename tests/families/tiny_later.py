"""Tiny random pipelines of Ovis-Image, ERNIE-Image and PRX: builders for `tiny_models.TINY`."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase

import diffusers
import torch
from transformers import (
    GemmaTokenizer,
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3Model,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig, T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from .tiny_parts import DECODER, WIDTH, alive, byte_tokenizer, flow, flux2_vae, kl


def gemma_tokenizer() -> GemmaTokenizer:
    """Every letter is a token."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate([*marks, *ascii_lowercase])}, merges=[])


def ovis_image(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.OvisImageTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    diffusers.OvisImagePipeline(
        transformer=alive(transformer),
        scheduler=flow(use_dynamic_shifting=True),
        vae=kl(16, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=Qwen3Model(Qwen3Config(**DECODER, num_hidden_layers=1)),
        tokenizer=byte_tokenizer(),
    ).save_pretrained(folder)


def ernie_image(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        text_in_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    vision = dict(
        model_type="pixtral",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
    )
    text = dict(DECODER, num_hidden_layers=2, model_type="mistral")
    diffusers.ErnieImagePipeline(
        transformer=alive(transformer),
        scheduler=flow(shift=4.0),
        vae=flux2_vae(batch_norm_eps=1e-5),  # what the pipeline takes, whatever the config says
        text_encoder=Mistral3Model(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=byte_tokenizer(),
        pe=Ministral3ForCausalLM(Ministral3Config(**DECODER, num_hidden_layers=1)),
        pe_tokenizer=byte_tokenizer(),
    ).save_pretrained(folder)


def prx(folder: Path) -> None:
    torch.manual_seed(2)
    transformer = diffusers.PRXTransformer2DModel(
        context_in_dim=WIDTH, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8], resolution_embeds=True
    )
    text = T5GemmaModuleConfig(**DECODER, num_hidden_layers=1)
    config = T5GemmaConfig(encoder=text, decoder=text)
    diffusers.PRXPipeline(
        transformer=alive(transformer),
        scheduler=flow(shift=3.0),
        vae=kl(16, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=T5GemmaEncoder(config.encoder).eval(),
        tokenizer=gemma_tokenizer(),
        default_sample_size=256,
    ).save_pretrained(folder)
    config.save_pretrained(folder / "text_encoder")  # as published: of the encoder and its decoder
