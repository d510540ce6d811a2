"""Distil tiny-sana to a few steps. The result is a miniature of SANA-Sprint.

B batch, C latent channels, h w latent grid; z_t = (1 - t) z_0 + t eps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from dcgen_convert import families
from dcgen_convert.families.base import Network
from dcgen_convert.train.objective import Draws, consistency_loss
from tools.tiny import transformers as base

RATIO = 0.9  # of neighbouring noise levels
GUIDANCE = (1.0, 5.0)


def start(teacher: Network, log: base.Log) -> Network:
    """``teacher`` with a guidance input that has no effect yet, and a time input in [0, 1] instead of [0, 1000]."""
    model = SanaTransformer2DModel.from_config({**teacher.config, "guidance_embeds": True})
    names = {name: name.replace("time_embed.emb.", "time_embed.") for name in teacher.state_dict()}
    model.load_state_dict({names[name]: value for name, value in teacher.state_dict().items()}, strict=False)
    nn.init.zeros_(model.time_embed.guidance_embedder.linear_2.weight)
    nn.init.zeros_(model.time_embed.guidance_embedder.linear_2.bias)
    times, old, new = torch.linspace(0, 1, 1001), teacher.time_embed.emb, model.time_embed
    with torch.no_grad():
        wanted = old.timestep_embedder(old.time_proj(1000 * times))
    seen = new.time_proj(times)
    optimizer = torch.optim.Adam(new.timestep_embedder.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    for _ in range(3000):
        loss = F.mse_loss(new.timestep_embedder(seen), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    log(f"time embedding: {loss.item():.2g} of {wanted.var().item():.2g}")
    return model


def train(teacher: Network, pairs: base.Pairs, training: base.Training, log: base.Log = print) -> Network:
    """Consistency distillation of the guided ``teacher``, with guidance g ~ U(GUIDANCE) as an input of the student."""
    batch = training.batch
    sana, sprint, student = families.get("sana"), families.get("sana-sprint"), start(teacher, log)
    null = {key: value.expand(batch, *value.shape[1:]) for key, value in pairs.null.items()}

    def guided(z: Tensor, t: Tensor, text: dict[str, Tensor], g: Tensor) -> Tensor:
        free = sana.velocity(teacher, z, t, null)
        return free + g[:, None, None, None] * (sana.velocity(teacher, z, t, text) - free)

    def loss_of(generator: torch.Generator) -> Tensor:
        z0, text = pairs.batch(torch.randint(len(pairs.z), (batch,), generator=generator))
        g = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(batch, generator=generator)
        draws = Draws(
            torch.randn(z0.shape, generator=generator),
            base.logit_normal(batch, training.shift, generator),
            g,
            torch.rand(batch, generator=generator) < 0.1,
        )
        return consistency_loss(sprint, student, z0, text, draws, pairs.null, guided, RATIO)

    return base.optimise(student, loss_of, training, log)
