"""Train the autoencoders of the tiny world in motion: kl-wan (Wan's, f8 t4 c16) and dc-ae-v-f32t4c32.

First they see pictures, then videos: pictures cost little, and teach colours and shapes. Then most steps of kl-wan see
parts of 64 px: of the same work they show more than whole videos.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from dcgen_convert.families.base import Network
from dcgen_convert.networks.autoencoder_dc_video import TIME, AutoencoderDCVideo, ChunkConv, Down, Kept, Up
from dcgen_convert.tiny import videos, world
from tools.tiny.loop import Log, Training, optimise, state_of

CHANNELS = 16  # of Wan's latents
CONFIGS = {
    "kl-wan": dict(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    ),
    "dc-ae-v-f32t4c32": dict(
        latent_channels=32,
        block_out_channels=(16, 32, 32, 64, 64, 64),
        layers_per_block=(0, 1, 1, 1, 1, 0),
        chunk_frames=8,
    ),
}
NAMES = (*CONFIGS,)
PICTURES = (
    0.15  # share of the steps of a deep autoencoder on videos that see one latent frame alone, as a picture is one
)
SEEDS = 2**31
PROBE, PROBES = 99, 32  # seed and number of the videos that say how large latents are


@dataclass(frozen=True)
class Phase:
    """Steps of ``batch`` videos of ``frames`` frames, of which a part of ``side`` px is seen."""

    steps: int
    batch: int
    lr: float
    side: int
    frames: int


# The rate falls with the batch: at 2e-3 two videos a step undo in 200 steps what was learnt of pictures.
PHASES = {
    "kl-wan": [Phase(1500, 12, 2e-3, 64, 1), Phase(1500, 2, 6e-4, 64, 9), Phase(300, 1, 4e-4, 128, 13)],
    "dc-ae-v-f32t4c32": [Phase(6000, 12, 2e-3, 128, 1), Phase(1200, 4, 2e-4, 128, 16)],
}


def new_model(name: str, seed: int) -> Network:
    """Autoencoder ``name`` of ``CONFIGS`` with random weights."""
    torch.manual_seed(seed)
    if name != "kl-wan":
        return AutoencoderDCVideo(**CONFIGS[name])
    model = AutoencoderKLWan(**CONFIGS[name])
    model.quant_conv.bias.data[CHANNELS:] = -7  # almost no noise: a posterior of std 1 would hide the latents
    return inflated(model)


@torch.no_grad()
def inflated(model: AutoencoderKLWan) -> AutoencoderKLWan:
    """``model`` with weights that see one frame at a time, as a picture's. Wan's authors inflated trained ones so.

    Of a convolution over three frames only the present one counts. Two frames become one by leaving the first out, and
    one becomes two by repeating it.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv3d) or layer.kernel_size[0] == 1:
            continue
        weight, present = layer.weight, layer.weight[:, :, -1:] * 3**0.5  # a third of the inputs, of the same variance
        weight.zero_()
        if not name.endswith("time_conv"):
            weight[:, :, -1:] = present
            continue
        times = layer.out_channels // layer.in_channels
        weight[:, :, -1, 0, 0] = torch.eye(layer.in_channels).repeat(times, 1)
        layer.bias.zero_()
    return model


def train(name: str, seed: int, work: Path, log: Log = print) -> Network:
    """Train autoencoder ``name`` with drawn videos, then write into its config how large its latents are.

    Args:
        work: folder of the states of its phases.
    """
    model = new_model(name, seed)
    for number, phase in enumerate(PHASES[name]):
        training = Training(phase.steps, phase.batch, phase.lr, seed + number, half=True, orthogonal=True)
        still = isinstance(model, AutoencoderDCVideo) and phase.frames == 1
        network = Still(model) if still else model
        network = optimise(network, loss(network, phase), training, log, state_of(work, name, number))
        model = network.moving(model) if still else network
    return set_scale(model.eval())


class FrameConv(nn.Conv2d):
    """What the middle of a `ChunkConv`'s kernel does: a convolution of each frame alone."""

    def forward(self, x: Tensor, kept: Kept) -> Tensor:  # type: ignore[override]  # noqa: ARG002
        """(B, C, T, H, W) -> (B, outer, T, H, W)."""
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


class Still(nn.Module):
    """A deep autoencoder of videos that stand still, as one of pictures: of kernels it has the middle only.

    A step costs a twelfth of one on four frames of as many videos.
    """

    def __init__(self, model: AutoencoderDCVideo):
        super().__init__()
        self.encoder, self.decoder = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
        for layer in [*self.modules()]:
            for name, conv in layer.named_children():
                if isinstance(conv, ChunkConv):
                    own = FrameConv(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
                    setattr(layer, name, own)

    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, 1, H, W) -> latents (B, c, 1, h, w)."""
        x = self.encoder.conv_in(pictures, {})
        for block in (block for stage in self.encoder.stages for block in stage):
            still = isinstance(block, Down) and block.time > 1
            x = block(x.expand(-1, -1, TIME, -1, -1) if still else x, {})
        return self.encoder.conv_out(x, {})

    def decode(self, z: Tensor) -> Tensor:
        """(B, c, 1, h, w) -> (B, 3, 1, H, W), the mean of the four frames."""
        x = self.decoder.conv_in(z, {})
        for block in (block for stage in reversed(self.decoder.stages) for block in stage):
            x = block(x, {})
            if isinstance(block, Up) and block.time > 1:
                x = x.mean(dim=2, keepdim=True)
        return self.decoder.conv_out(F.silu(self.decoder.norm_out(x)), {})

    @torch.no_grad()
    def moving(self, model: AutoencoderDCVideo) -> AutoencoderDCVideo:
        """``model`` with these weights: it makes of every frame of a still video what this makes of the picture."""
        known = self.state_dict()
        for name, weight in model.state_dict().items():
            if weight.ndim != 5:
                weight.copy_(known[name])
                continue
            weight.zero_()
            weight[:, :, 1] = known[name]
        for block in model.decoder.modules():
            if isinstance(block, Up) and block.time > 1:  # four frames alike
                for weight in block.conv.parameters():
                    mean = weight.unflatten(0, (-1, block.time)).mean(dim=1, keepdim=True)
                    weight.copy_(mean.expand(-1, block.time, *weight.shape[1:]).flatten(0, 1))
        return model


def loss(model: Network, phase: Phase) -> Callable[[torch.Generator], Tensor]:
    """Loss of a round trip of newly drawn videos: pixels, their differences to all neighbours, and the latents."""

    def of(generator: torch.Generator) -> Tensor:
        frames = phase.frames
        if isinstance(model, AutoencoderDCVideo) and torch.rand(1, generator=generator).item() < PICTURES:
            frames = TIME
        clips = drawn(phase.batch, frames, phase.side, generator)
        output, regulariser = reconstruct(model, clips, generator)
        output = output.float()
        axes = [axis for axis in (2, 3, 4) if clips.shape[axis] > 1]
        edges = sum(F.l1_loss(output.diff(dim=axis), clips.diff(dim=axis)) for axis in axes)
        return F.l1_loss(output, clips) + 2 * F.mse_loss(output, clips) + 0.5 * edges + regulariser

    return of


def drawn(count: int, frames: int, side: int, generator: torch.Generator) -> Tensor:
    """Parts of new videos, at random places and moments: (count, 3, frames, side, side)."""

    def number(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    seed = number(SEEDS)
    start, top, left = number(videos.FRAMES - frames + 1), number(world.SIDE - side + 1), number(world.SIDE - side + 1)
    labels, moments = videos.sample_labels(count, seed), videos.moments()[start : start + frames]
    clips = torch.stack([videos.frame(labels, seed, moment) for moment in moments], dim=2)
    return clips[..., top : top + side, left : left + side].contiguous()


def reconstruct(model: Network, clips: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Round trip for training: clips -> reconstruction, and a loss on the latents (KL, or their energy)."""
    if not isinstance(model, (AutoencoderDCVideo, Still)):
        posterior = model.encode(clips).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        output = model.decode(posterior.mean + posterior.std * noise).sample
        return output, 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
    still = isinstance(model, Still)
    latent = model.encode(clips) if still else model.encoder(clips)
    noise = torch.randn(latent.shape, generator=generator)
    noisy = latent + 0.05 * latent.detach().square().mean().sqrt() * noise  # makes latents smooth, as of DC-AE
    # its `decode` would leave out the last three frames
    return model.decode(noisy) if still else model.decoder(noisy), 1e-4 * latent.square().mean()


@torch.no_grad()
def set_scale(model: Network) -> Network:
    """Write into the config how large latents are: Wan's mean and std of each channel; for DC-AE-V 1 / RMS of all."""
    frames = videos.FRAMES - (0 if isinstance(model, AutoencoderDCVideo) else TIME - 1)
    labels = videos.sample_labels(PROBES, PROBE)
    clips = (videos.draw(rows, PROBE + i)[:, :, :frames] for i, rows in enumerate(labels.split(8)))
    latents = torch.cat([model.encode(part).latent_dist.mode() for part in clips]).transpose(0, 1).flatten(1)
    if not isinstance(model, AutoencoderDCVideo):
        mean, std = ([round(value, 4) for value in of.tolist()] for of in (latents.mean(1), latents.std(1)))
        model.register_to_config(latents_mean=mean, latents_std=std)
        return model
    scale = round(1 / latents.square().mean().sqrt().item(), 4)
    scaled = AutoencoderDCVideo(**{**model.config, "scaling_factor": scale})
    scaled.load_state_dict(model.state_dict())
    return scaled.eval()
