"""Train tiny-wan: on pictures first, as the authors of Wan did, then on videos.

A picture is the first frame of a video: its latent frame is that of the video, with a quarter of the tokens.
B batch, C latent channels, T latent frames, h w latent grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from dcgen_convert import families
from dcgen_convert.core.files import atomic_save
from dcgen_convert.families.base import Network
from dcgen_convert.families.wan import FLOW
from dcgen_convert.networks import autoencoders
from dcgen_convert.tiny import videos, world
from tools.tiny import text
from tools.tiny import transformers as base
from tools.tiny.loop import Log, Training, state_of

VAE = "kl-wan"
FRAMES = videos.FRAMES - 3  # of which Wan's autoencoder makes as many latent frames as another of all
PART = 256  # videos of one file of latents
SEED = 7


@dataclass(frozen=True)
class Phase:
    """What a phase sees: ``frames`` of the ``count`` videos of set ``part``, in steps of ``batch``."""

    steps: int
    lr: float
    shift: float
    batch: int
    frames: int
    count: int
    part: int


PHASES = (
    Phase(3600, 1.5e-3, 2.0, 32, 1, 24_576, 0),
    Phase(1500, 1.2e-3, 3.0, 24, FRAMES, 8192, 1),
    Phase(1500, 1e-3, 3.0, 24, FRAMES, 8192, 1),
)


def train(work: Path, log: Log = print) -> Network:
    """Train the transformer with latents of newly drawn videos. Latents and states are kept in ``work``."""
    family, model = base.new_model("wan", SEED)
    for number, phase in enumerate(PHASES):
        training = Training(phase.steps, phase.batch, phase.lr, SEED + number, phase.shift, half=True, orthogonal=True)
        seen = pairs(work, world.block_seed(SEED, phase.part), phase.frames, phase.count, log)
        model = base.train_flow(family, model, seen, training, log, state_of(work, "wan", number))
    return model


@torch.no_grad()
def pairs(work: Path, seed: int, frames: int, count: int, log: Log = print) -> base.Pairs:
    """Latents of the first ``frames`` frames of drawn videos, with the conditions of their captions."""
    labels = videos.sample_labels(count, seed)
    z = latents(work, labels, seed, frames, log)
    encoder, tokenizer = text.umt5()
    pipeline = WanPipeline(tokenizer, encoder, vae=None, scheduler=None)
    captions = [videos.caption(row) for row in labels.tolist()]
    known = {caption: row for row, caption in enumerate(sorted(set(captions)))}
    every, family = list(known), families.get("wan")
    parts = [family.encode_text(pipeline, every[i : i + 200], text.LENGTH) for i in range(0, len(every), 200)]
    table = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    log(f"latents {tuple(z.shape)}, mean {z.mean():.3f}, std {z.std():.3f}; {len(known)} captions")
    rows = torch.tensor([known[caption] for caption in captions])
    return base.Pairs(z, rows, table, family.encode_text(pipeline, [""], text.LENGTH))


def latents(work: Path, labels: Tensor, seed: int, frames: int, log: Log = print) -> Tensor:
    """Model latents (S, C, T, h, w) of videos of ``labels`` (S, 7). Files hold them in parts: those there are not made.

    The autoencoder computes in bfloat16, several times as fast. What that rounds is 3 % of the latents (RMS).
    """
    codec, folder, found = autoencoders.load(work / VAE), work / f"wan-latents-{frames}-{seed}", []
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(labels.split(PART)):
        file = folder / f"{number:04d}.safetensors"
        if not file.exists():
            z = []
            for i, some in enumerate(rows.split(8)):
                clips = torch.stack(
                    [videos.frame(some, seed + PART * number + i, moment) for moment in videos.moments()[:frames]], 2
                )
                with torch.autocast("cpu", torch.bfloat16):
                    z.append(codec.encode(clips))
            atomic_save({"z": torch.cat(z)}, file)
            log(f"{folder.name}: {PART * number + len(rows)} of {len(labels)}")
        found.append(load_file(file)["z"])
    return torch.cat(found)


def pipeline(work: Path) -> WanPipeline:
    encoder, tokenizer = text.umt5()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        transformer=WanTransformer3DModel.from_pretrained(work / "wan", dtype=torch.bfloat16),
        vae=autoencoders.load(work / VAE, torch.bfloat16).model,
        scheduler=UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
    )
