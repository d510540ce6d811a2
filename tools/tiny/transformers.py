"""Train the base networks of the tiny world: tiny-flux, tiny-kontext, tiny-sana, tiny-wan, tiny-dit and tiny-unet.

For tiny-flux a teacher is trained with dropped conditions first. Then its guidance is distilled into a student. So it
is for tiny-kontext.
B batch, C latent channels, h w latent grid, L text tokens; everywhere z_t = (1 - t) z_0 + t eps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from dcgen_convert import families
from dcgen_convert.families import Family, Text, ddpm
from dcgen_convert.families.base import Network, per_row
from dcgen_convert.families.dit import NULL_CLASS
from dcgen_convert.tiny import world
from tools.tiny.loop import Log, Training, optimise

FLUX = dict(
    patch_size=1,
    in_channels=64,
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    guidance_embeds=True,
    axes_dims_rope=(8, 12, 12),
)
SANA = dict(
    in_channels=32,
    out_channels=32,
    num_attention_heads=4,
    attention_head_dim=32,
    num_layers=6,
    num_cross_attention_heads=4,
    cross_attention_head_dim=32,
    cross_attention_dim=128,
    caption_channels=64,
    sample_size=4,
    patch_size=1,
)
DIT = dict(
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=4,
    out_channels=8,
    num_layers=4,
    sample_size=16,
    patch_size=2,
    num_embeds_ada_norm=1000,
)
WAN = dict(
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=16,
    out_channels=16,
    text_dim=64,
    freq_dim=64,
    ffn_dim=512,
    num_layers=5,
    rope_max_seq_len=64,
)
UNET = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 96, 160),
    # attention on the lower grids only: at 16 x 16 it would cost as much as all the rest
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=64,
    attention_head_dim=4,  # heads, as in Stable Diffusion 1.5
    norm_num_groups=16,
)
GUIDANCE_RANGE = (1.0, 6.0)  # of the distilled tiny-flux


@dataclass
class Pairs:
    """S latents, the conditions of all captions, and which caption belongs to which latent.

    Attributes:
        row: row of each latent's condition in ``text``.
        null: condition of the empty prompt, a batch of one.
    """

    z: Tensor  # (S, C, h, w)
    row: Tensor  # (S,)
    text: dict[str, Tensor]
    null: dict[str, Tensor]

    def batch(self, index: Tensor, drop: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (B, C, h, w) at ``index`` (B,), and their conditions; where ``drop`` (B,) is true, the null one."""
        rows = self.row[index]
        text = {key: value[rows] for key, value in self.text.items()}
        if drop is not None:
            for key, value in text.items():
                mask = drop.reshape(-1, *[1] * (value.ndim - 1))
                text[key] = torch.where(mask, self.null[key].to(value.dtype), value)
        return self.z[index], text


@torch.no_grad()
def encode_pictures(vae: Network, labels: Tensor, seed: int) -> Tensor:
    """Model latents (S, C, h, w) of pictures that are drawn from ``labels`` (S, 6)."""
    parts = []
    for start in range(0, len(labels), 100):
        pictures = world.draw(labels[start : start + 100], seed + 1 + start)
        if isinstance(vae, AutoencoderDC):
            parts.append(vae.encode(pictures).latent * vae.config.scaling_factor)
        else:
            parts.append(
                (vae.encode(pictures).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
            )
    return torch.cat(parts)


def logit_normal(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels in (0, 1), (count,): the sigmoid of normal numbers, then shifted towards 1 by ``shift``."""
    s = torch.sigmoid(torch.randn(count, generator=generator))
    return shift * s / (1 + (shift - 1) * s)


def train_flow(
    family: Family, model: Network, pairs: Pairs, training: Training, log: Log = print, state: Path | None = None
) -> Network:
    """Flow matching; 10 % of the conditions are dropped, for classifier-free guidance. ``state``: as of `optimise`."""

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pairs.z), (training.batch,), generator=generator)
        z0, text = pairs.batch(index, torch.rand(training.batch, generator=generator) < 0.1)
        eps = torch.randn(z0.shape, generator=generator)
        t = logit_normal(training.batch, training.shift, generator)
        zt = torch.lerp(z0, eps, per_row(t, z0))
        return F.mse_loss(family.predict(model, zt, t, text, torch.ones(training.batch)), family.target(z0, eps))

    return optimise(model, loss_of, training, log, state)


def distill_guidance(family: Family, teacher: Network, pairs: Pairs, training: Training, log: Log = print) -> Network:
    """A student that learns v_0 + g (v_c - v_0) of the frozen teacher, with g ~ U(GUIDANCE_RANGE) as an input.

    FLUX.1 dev was made in the same way.
    """
    student = copy.deepcopy(teacher)
    low, high = GUIDANCE_RANGE

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pairs.z), (training.batch,), generator=generator)
        z0, text = pairs.batch(index, torch.rand(training.batch, generator=generator) < 0.1)
        eps = torch.randn(z0.shape, generator=generator)
        t = logit_normal(training.batch, training.shift, generator)
        zt = torch.lerp(z0, eps, t[:, None, None, None])
        g = low + (high - low) * torch.rand(training.batch, generator=generator)
        with torch.no_grad():
            ones = torch.ones(training.batch)
            null = text | {key: value.expand(training.batch, *value.shape[1:]) for key, value in pairs.null.items()}
            free = family.predict(teacher, zt, t, null, ones)
            goal = free + g[:, None, None, None] * (family.predict(teacher, zt, t, text, ones) - free)
        return F.mse_loss(family.predict(student, zt, t, text, g), goal)

    return optimise(student, loss_of, training, log)


def train_dit(_: Family, model: Network, pairs: Pairs, training: Training, log: Log = print) -> Network:
    """Epsilon MSE plus the variational bound for the learned sigma (improved DDPM, arXiv 2102.09672, eq. 14-16)."""
    alphas = ddpm.alphas(ddpm.LINEAR)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    betas = 1 - alphas / before
    posterior = betas * (1 - before) / (1 - alphas)
    posterior[0] = posterior[1]
    coefficient = (betas.square() / (1 - betas) / (1 - alphas)).float()
    log_beta, log_posterior = betas.log().float(), posterior.log().float()
    weight = epsilon_weight(alphas)

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pairs.z), (training.batch,), generator=generator)
        z0, text = pairs.batch(index, torch.rand(training.batch, generator=generator) < 0.1)
        tau = torch.randint(ddpm.TRAIN_STEPS, (training.batch,), generator=generator)
        eps = torch.randn(z0.shape, generator=generator)
        x = (
            alphas[tau].sqrt().float()[:, None, None, None] * z0
            + (1 - alphas[tau]).sqrt().float()[:, None, None, None] * eps
        )
        output = model(x, timestep=tau.float(), class_labels=text["class_labels"], return_dict=False)[0]
        predicted, v = output.chunk(2, dim=1)
        shape = (-1, 1, 1, 1)
        mix = (v + 1) / 2
        log_variance = mix * log_beta[tau].reshape(shape) + (1 - mix) * log_posterior[tau].reshape(shape)
        # KL divergence of two Gaussians; their means differ by coefficient^(1/2) (eps - predicted)
        distance = coefficient[tau].reshape(shape) * (eps - predicted.detach()).square()
        ratio = log_posterior[tau].reshape(shape) - log_variance
        bound = 0.5 * (-1 - ratio + ratio.exp() + distance * (-log_variance).exp())
        error = (predicted - eps).square().mean(dim=(1, 2, 3))
        return (weight[tau] * error).mean() + 1e-3 * bound.mean()

    return optimise(model, loss_of, training, log)


def train_unet(family: Family, model: Network, pairs: Pairs, training: Training, log: Log = print) -> Network:
    """Epsilon MSE at uniform DDPM steps; 10 % of the conditions are dropped."""
    times = family.noise_times()
    weight = epsilon_weight(ddpm.alphas(ddpm.SCALED_LINEAR))

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pairs.z), (training.batch,), generator=generator)
        z0, text = pairs.batch(index, torch.rand(training.batch, generator=generator) < 0.1)
        tau = torch.randint(ddpm.TRAIN_STEPS, (training.batch,), generator=generator)
        eps = torch.randn(z0.shape, generator=generator)
        t = times[tau].float()
        predicted = family.predict(model, torch.lerp(z0, eps, t[:, None, None, None]), t, text).float()
        return (weight[tau] * (predicted - eps).square().mean(dim=(1, 2, 3))).mean()

    return optimise(model, loss_of, training, log)


def epsilon_weight(alphas: Tensor) -> Tensor:
    """Weight of the squared error of epsilon at every DDPM step, (S,) float32.

    An error of epsilon is an error of v times sqrt(alpha). Without weights the network would learn heavy noise last,
    and heavy noise decides the layout of a picture.
    """
    return (1 / alphas).clamp(max=25).float()


def caption_table(encode: Callable[[list[str]], Text]) -> tuple[Text, Text]:
    """Conditions of all captions, with rows in the order of :func:`caption_row`, and that of the empty prompt."""
    grids = torch.cartesian_prod(*[torch.arange(len(names)) for names in world.ATTRIBUTES.values()])
    captions = [world.caption(row) for row in grids.tolist()]
    parts = [encode(captions[i : i + 200]) for i in range(0, len(captions), 200)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, encode([""])


def caption_row(labels: Tensor) -> Tensor:
    """Rows of :func:`caption_table` for labels (S, 6): (S,)."""
    row = torch.zeros(len(labels), dtype=torch.long)
    for i, names in enumerate(world.ATTRIBUTES.values()):
        row = row * len(names) + labels[:, i]
    return row


def class_pairs(z: Tensor, labels: Tensor) -> Pairs:
    """Latents with their class (shape and colour) as condition."""
    rows = labels[:, 0] * len(world.COLORS) + labels[:, 1]
    return Pairs(
        z, rows, {"class_labels": torch.arange(len(world.CLASSES))}, {"class_labels": torch.tensor([NULL_CLASS])}
    )


MODELS = {
    "flux": (FluxTransformer2DModel, FLUX),
    "sana": (SanaTransformer2DModel, SANA),
    "dit": (DiTTransformer2DModel, DIT),
    "wan": (WanTransformer3DModel, WAN),
    "unet": (UNet2DConditionModel, UNET),
}


def new_model(name: str, seed: int) -> tuple[Family, Network]:
    """A family and a network of it with random weights, whose head writes zeros."""
    torch.manual_seed(seed)
    cls, config = MODELS[name]
    model = cls(**config)
    family = families.get(name)
    nn.init.zeros_(model.get_submodule(family.head).weight)
    nn.init.zeros_(model.get_submodule(family.head).bias)
    return family, model
