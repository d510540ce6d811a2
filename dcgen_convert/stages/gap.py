"""Representation gap: the distance between the image tokens of the converted model and of the base, after each block.

The paper uses it as a sign of alignment: for FLUX the distance after block 0 / 5 / 10 / 15 falls from 0.24 / 4.88 /
53.6 / 345 to 0.02 / 0.37 / 2.24 / 12.5. Both models see the same pictures at the same t, each with noise of its own
latent space. The base's tokens are average-pooled onto the converted grid. Pictures of several shapes are taken in
turn, one at a time: the tokens after all 57 blocks of FLUX are 2.9 GB of float32 for one picture of 1024 px.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgen_convert.data import buckets
from dcgen_convert.data.cache import LatentCache
from dcgen_convert.families import Family
from dcgen_convert.families.base import Network
from dcgen_convert.networks import models, pipelines
from dcgen_convert.stages.job import Job
from dcgen_convert.train import objective
from dcgen_convert.train.phases import sampling_of

PICTURES = 32
T = 0.3  # little noise: what is compared is content


@torch.no_grad()
def measure(job: Job, converted: Network, rows: LatentCache) -> list[float]:
    """Relative squared distance ||a - b||^2 / ||b||^2 of the image tokens after every block, in forward order."""
    device = next(converted.parameters()).device
    base = models.load(job.source.transformer, pipelines.DTYPES[job.recipe.dtype], device=str(device))
    sums: list[Tensor] = []  # (blocks, 2) of every picture: squared distance and squared norm
    for index in (index for part in buckets.first_of_each(rows.spans, PICTURES) for index in part):
        text = rows.batch([index])[1]
        tokens: list[list[Tensor]] = []
        for model, latent in zip((base, converted), rows.pairs([index]), strict=True):
            sampling = sampling_of(job.family, job.recipe.adapt, latent.shape[1:], model.config, job.scheduler)
            drawn = objective.draw(job.recipe.seed, 0, [index], latent.shape[1:], sampling, objective.EVALUATION)
            drawn = replace(drawn, t=torch.full((1,), T))
            tokens.append(block_tokens(job.family, model, *objective.to_device((latent, text, drawn), device)))
        sums.append(torch.stack([squares(old, new) for old, new in zip(*tokens, strict=True)]).cpu())
    distance, norm = reduce(torch.add, sums).unbind(1)
    return (distance / norm).tolist()


def squares(old: Tensor, new: Tensor) -> Tensor:
    """(2,) float64: squared distance of the maps (B, D, rows, cols), ``old`` pooled onto the grid of ``new``, and
    squared norm.
    """
    goal = F.interpolate(old, size=tuple(new.shape[-2:]), mode="area")
    return torch.stack([part.double().square().sum() for part in (new - goal, goal)])


def block_tokens(
    family: Family, model: Network, z0: Tensor, text: dict[str, Tensor], drawn: objective.Draws
) -> list[Tensor]:
    """Image tokens after every block at the drawn noise, each as a map (B, D, rows, cols)."""
    patch = family.patch(model.config, z0.shape[1])
    grid = (z0.shape[2] // patch, z0.shape[3] // patch)
    blocks = family.block_modules(model)
    outputs: dict[nn.Module, list[Tensor]] = {block: [] for block in blocks}  # a family may split the batch

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        outputs[module].append(family.block_map(output, grid, text).float())

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        z = objective.noised(z0, drawn.eps, drawn.t)
        objective.predict(family, model, z, drawn.t, text, torch.ones_like(drawn.t))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in outputs.values()]
