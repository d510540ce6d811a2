"""Train the autoencoders of the tiny world.

AutoencoderKL f8c16 (like FLUX's) and f8c4 (like Stable Diffusion's); AutoencoderDC f32c32, f64c128, f128c512 and
f256c2048.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL

from dcgen_convert.families.base import Network
from dcgen_convert.tiny import world

POOL = 6000  # pictures of SIDE px that are drawn once. Drawing new ones for every step would take longer than the step.
KL = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(8, 16, 32, 64),
    layers_per_block=1,
    norm_num_groups=1,  # small groups would remove the colour of a flat background
    mid_block_add_attention=False,
    sample_size=world.SIDE,
)


def dc(channels: int, widths: tuple[int, ...], layers: tuple[int, ...]) -> dict[str, Any]:
    """Config of an AutoencoderDC without layers in its first level, as in the published in, mix and 1.5 models."""
    return dict(
        latent_channels=channels,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * len(widths),
        decoder_qkv_multiscales=((),) * len(widths),
        upsample_block_type="pixel_shuffle",
    )


CONFIGS = {
    "kl-f8c16": (AutoencoderKL, {**KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}),
    "kl-f8c4": (AutoencoderKL, {**KL, "latent_channels": 4}),
    "dc-f32c32": (AutoencoderDC, dc(32, (8, 16, 32, 64, 128, 128), (0, 1, 1, 2, 2, 2))),
    "dc-f64c128": (AutoencoderDC, dc(128, (8, 16, 32, 64, 128, 128, 128), (0, 1, 1, 1, 1, 1, 1))),
    # no block at the last level: there a picture is one cell, of which a 3 x 3 kernel sees the centre only
    "dc-f128c512": (AutoencoderDC, dc(512, (8, 16, 32, 64, 128, 128, 128, 512), (0, 1, 1, 1, 1, 1, 1, 0))),
    "dc-f256c2048": (AutoencoderDC, dc(2048, (8, 16, 32, 64, 128, 128, 128, 512, 2048), (0, 1, 1, 1, 1, 1, 1, 1, 0))),
}
# px of the pictures that it learns from, where they are larger than those of the base models
SIDES = dict.fromkeys(("dc-f64c128-256px", "dc-f128c512-256px", "dc-f256c2048"), 2 * world.SIDE)
CONFIGS |= {name: CONFIGS[name.removesuffix("-256px")] for name in SIDES}
# Its new layers stay at zero, so that a cell holds four cells of f128. Their kernels would have 125 M weights, of which
# a picture of one cell reaches a ninth, and a step would take 12 s.
PACKED = "dc-f256c2048"


def reconstruct(
    model: Network, pictures: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round trip for training: (B, 3, H, W) -> reconstruction, and a loss on the latents (KL, or their energy)."""
    if isinstance(model, AutoencoderKL):
        posterior = model.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        pixels = model.decode(posterior.mean + posterior.std * noise).sample
        return pixels, 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
    latent = model.encode(pictures).latent
    # DC-AE has no posterior. A little noise makes its latents smooth enough for a diffusion model.
    noisy = latent + 0.05 * latent.detach().square().mean().sqrt() * torch.randn(latent.shape, generator=generator)
    return model.decode(noisy).sample, 1e-4 * latent.square().mean()


def train(
    name: str,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    log: Callable[[str], None] = print,
    start: Network | None = None,
) -> Network:
    """Train autoencoder ``name`` of ``CONFIGS`` with drawn pictures, then set its scaling factor and shift.

    Args:
        start: a trained autoencoder of the same widths. Its weights are copied where the shapes agree.
            The other tensors of a DC-AE begin at zero: its shortcuts then hand four cells on as one.
    """
    torch.manual_seed(seed)
    cls, config = CONFIGS[name]
    side = SIDES.get(name, world.SIDE)
    model = cls(**config).train()
    if start is not None:
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        fitting = {key: value for key, value in _moved(start, model).items() if shapes.get(key) == value.shape}
        model.load_state_dict(fitting, strict=False)
        log(f"{name} starts from {len(fitting)} of {len(shapes)} tensors")
        for key, value in model.named_parameters() if cls is AutoencoderDC else ():
            if key not in fitting:
                value.detach().zero_()
                value.requires_grad_(name != PACKED)
    if isinstance(model, AutoencoderKL):  # begin with almost no noise: a posterior of std 1 would hide the latents
        (model.quant_conv or model.encoder.conv_out).bias.data[model.config.latent_channels :] = -7
    weights = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    ema = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    count = POOL * world.SIDE**2 // side**2
    pool = torch.cat(
        [world.draw(rows, seed + i, side) for i, rows in enumerate(world.sample_labels(count, seed).split(50))]
    )
    started = time.time()
    for step in range(steps):
        pictures = pool[torch.randint(count, (batch,), generator=generator)]
        output, regulariser = reconstruct(model, pictures, generator)
        loss = (
            F.l1_loss(output, pictures)
            + 2 * F.mse_loss(output, pictures)
            + 0.5 * F.l1_loss(_edges(output), _edges(pictures))
        )
        (loss + regulariser).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.995, (step + 1) / (step + 20))
        torch._foreach_lerp_(list(ema.values()), [value.detach() for value in weights], 1 - decay)
        if step % 50 == 0 or step == steps - 1:
            psnr = -10 * math.log10(F.mse_loss(output, pictures).item() / 4)
            log(
                f"{name} step {step} loss {loss.item():.4f} psnr {psnr:.2f} dB "
                f"{(time.time() - started) / (step + 1):.3f} s/step"
            )
    model.load_state_dict(ema, strict=False)
    return set_scale(model.eval(), side)


def _moved(start: Network, model: Network) -> dict[str, torch.Tensor]:
    """The tensors of ``start`` under the keys of ``model``, a DC-AE that may have one more level.

    In that one the decoder's last level of ``start`` begins with an upsampling, so its other layers come one later.
    """
    if not isinstance(start, AutoencoderDC) or len(start.decoder.up_blocks) == len(model.decoder.up_blocks):
        return start.state_dict()
    last = f"decoder.up_blocks.{len(start.decoder.up_blocks) - 1}."
    return {
        re.sub(rf"^{re.escape(last)}(\d+)", lambda found: f"{last}{int(found[1]) + 1}", key): value
        for key, value in start.state_dict().items()
    }


def _edges(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([(x[..., :, 1:] - x[..., :, :-1]).flatten(1), (x[..., 1:, :] - x[..., :-1, :]).flatten(1)], dim=1)


@torch.no_grad()
def set_scale(model: Network, side: int = world.SIDE) -> Network:
    """Write the scale of the latents of pictures of ``side`` px into the config.

    A VAE like FLUX's gets scaling_factor = 1 / std and shift_factor = mean; the others get scaling_factor = 1 / RMS.
    """
    pictures = world.draw(world.sample_labels(512, 99), 99, side)
    if isinstance(model, AutoencoderDC):
        latents = torch.cat([model.encode(p).latent for p in pictures.split(64)])
        model.register_to_config(scaling_factor=round(1 / latents.square().mean().sqrt().item(), 4))
        return model
    latents = torch.cat([model.encode(p).latent_dist.mean for p in pictures.split(64)])
    if model.config.latent_channels == 16:
        shift = round(latents.mean().item(), 4)
        model.register_to_config(shift_factor=shift, scaling_factor=round(1 / latents.std().item(), 4))
    else:
        model.register_to_config(scaling_factor=round(1 / latents.square().mean().sqrt().item(), 4))
    return model
