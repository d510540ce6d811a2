"""Tiny pipelines of families of videos, with random weights; and an autoencoder of videos of any compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from bundle.conftest import sana_source, tokenizer_t5
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from .tiny_entry import Tiny
from .tiny_parts import WIDTH, alive


def video_vae(factor: int, channels: int, folded: int = 1) -> diffusers.AutoencoderKLWan:
    """Wan's autoencoder, four frames to a latent frame; latents with statistics away from 0 and 1.

    folded: px per side that it folds into channels first; more than 1: with Wan 2.2's residual blocks.
    """
    levels = (factor // folded).bit_length()
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1] * levels,
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 3) + [True, True],
        latents_mean=(0.5 * torch.randn(channels)).tolist(),
        latents_std=(0.5 + torch.rand(channels)).tolist(),
        scale_factor_spatial=factor,
        **(dict.fromkeys(("in_channels", "out_channels"), 3 * folded**2) if folded > 1 else {}),
        patch_size=folded if folded > 1 else None,
        is_residual=folded > 1,
    ).eval()


def ltx_vae(channels: int, pixels: torch.Tensor | None = None, factor: int = 32) -> diffusers.AutoencoderKLLTX2Video:
    """LTX-2's autoencoder, eight frames to a latent frame; with statistics of its latents of ``pixels``,
    (B, 3, F, H, W), or such away from 0 and 1.
    """
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=channels,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_causal=False,
        patch_size=factor // 8,
        spatial_compression_ratio=factor,
        temporal_compression_ratio=8,
    ).eval()
    vae.latents_mean.copy_(torch.randn(channels))
    vae.latents_std.copy_(torch.rand(channels) + 0.5)
    if pixels is not None:
        with torch.no_grad():
            z = vae.encode(pixels).latent_dist.mode().movedim(1, 0).flatten(1)
        vae.latents_mean.copy_(z.mean(1))
        vae.latents_std.copy_(z.std(1, correction=0))
    return vae


def parts(**options: Any) -> dict[str, Any]:
    """What pipelines of Wan 2.1 are made of; ``options`` of the transformer."""
    torch.manual_seed(2)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        **options,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    text = UMT5Config(vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return dict(
        transformer=alive(transformer),
        scheduler=scheduler,
        vae=video_vae(8, 16),
        text_encoder=UMT5EncoderModel(text).eval(),
        tokenizer=tokenizer_t5(),
    )


def wan(folder: Path) -> None:
    diffusers.WanPipeline(**parts()).save_pretrained(folder)


def wan_22(folder: Path) -> None:
    """Wan 2.2 TI2V: f16, and a timestep for every 2 x 2 cells."""
    networks = parts(in_channels=48, out_channels=48) | {"vae": video_vae(16, 48, folded=2)}
    diffusers.WanPipeline(**networks, expand_timesteps=True).save_pretrained(folder)


def second(**options: Any) -> dict[str, Any]:
    """The second network of a Wan 2.2 A14B, with weights of its own."""
    torch.manual_seed(3)
    sizes = dict(num_attention_heads=2, attention_head_dim=24, text_dim=WIDTH, freq_dim=16, ffn_dim=64, num_layers=2)
    return {"transformer_2": alive(diffusers.WanTransformer3DModel(**sizes, **options))}


def wan_a14b(folder: Path) -> None:
    diffusers.WanPipeline(**parts(), **second(), boundary_ratio=0.875).save_pretrained(folder)


def wan_image_a14b(folder: Path) -> None:
    networks = parts(in_channels=36, out_channels=16) | second(in_channels=36, out_channels=16)
    none = dict(image_encoder=None, image_processor=None)
    diffusers.WanImageToVideoPipeline(**networks, **none, boundary_ratio=0.9).save_pretrained(folder)


def sana_video(folder: Path, vae: Any = None, **options: Any) -> None:
    """On Wan's autoencoder, or on ``vae`` with ``options`` of the transformer."""
    sana_source(folder)
    text = diffusers.SanaPipeline.from_pretrained(folder).components
    torch.manual_seed(2)
    transformer = diffusers.SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=WIDTH,
        mlp_ratio=2.0,
        **options,
    )
    diffusers.SanaVideoPipeline(
        tokenizer=text["tokenizer"],
        text_encoder=text["text_encoder"],
        vae=vae or video_vae(8, 16),
        transformer=alive(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    ).save_pretrained(folder)


def wan_image(folder: Path) -> None:
    networks = parts(in_channels=36, image_dim=WIDTH, added_kv_proj_dim=48)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        num_hidden_layers=2,
    )
    diffusers.WanImageToVideoPipeline(
        **networks,
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    ).save_pretrained(folder)


VIDEOS: dict[str, Tiny] = {
    # UniPC spaces its steps from 1 to 1 / 1000, DPM-Solver from 999 / 1000 to 0
    "wan": Tiny(wan, None, length=32, side=64, frames=9, middle=0.5005),
    "wan-2.2": Tiny(wan_22, None, length=32, side=64, frames=9, middle=0.5005, factor=16),
    "sana-video": Tiny(sana_video, None, length=32, side=64, frames=9, middle=0.4995),
    "wan-a14b": Tiny(wan_a14b, None, length=32, side=64, frames=9, middle=0.5005),
    "wan-image-a14b": Tiny(wan_image_a14b, None, length=32, side=64, frames=9, middle=0.5005, references=((48, 80),)),
    "wan-image": Tiny(wan_image, None, length=512, side=64, frames=9, middle=0.5005, references=((48, 80),)),
}
