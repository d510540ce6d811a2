"""Tiny random pipelines with U-Nets: builders for `tiny_models.TINY`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from bundle.conftest import tokenizer_clip
from transformers import CLIPTextModel

from .tiny_parts import alive, clip_projection, kl

NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def parts(width: int, **config: Any) -> dict[str, Any]:
    """What the pipelines are made of. The network's texts have ``width``; ``config`` of the network."""
    text = CLIPTextModel(clip_projection(3).config)
    torch.manual_seed(2)
    network = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
        **config,
    )
    return dict(
        unet=alive(network),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        vae=kl(4, scaling_factor=0.18),
        text_encoder=text.eval(),
        tokenizer=tokenizer_clip(),
    )


def unet(folder: Path) -> None:
    diffusers.StableDiffusionPipeline(**parts(8), **NO_CHECKER).save_pretrained(folder)


def unet_xl(folder: Path) -> None:
    further = dict(addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 8)
    diffusers.StableDiffusionXLPipeline(
        **parts(16, addition_embed_type="text_time", use_linear_projection=True, **further),
        text_encoder_2=clip_projection(4),
        tokenizer_2=tokenizer_clip(),
    ).save_pretrained(folder)
