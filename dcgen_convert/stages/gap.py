"""Representation gap: the distance between the image tokens of the converted model and of the base, after each block.

The paper uses it as a sign of alignment: for FLUX the distance after block 0 / 5 / 10 / 15 falls from 0.24 / 4.88 /
53.6 / 345 to 0.02 / 0.37 / 2.24 / 12.5. Both models see the same pictures at the same t, each with noise of its own
latent space. The base sees them as it did for the alignment: at the home size, where both have the same tokens, or at
the same size as the converted model, and then its tokens are average-pooled onto the converted grid. So it is measured
on the pictures of the first phase, and the figures of all phases can be compared.

One model is in memory at a time. The tokens of the converted model go to files first, a file per picture: those after
all 57 blocks of FLUX are .36 GB in bfloat16 for one picture of 1024 px at f32, and 11 GB for all pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dcgen_convert.core import clock, pulse
from dcgen_convert.core.files import TEMPORARY, save_tensors
from dcgen_convert.data import buckets
from dcgen_convert.data.cache import LatentCache
from dcgen_convert.families import Family
from dcgen_convert.families.base import Network
from dcgen_convert.families.tensors import pooled
from dcgen_convert.networks import models, pipelines
from dcgen_convert.stages.job import Job
from dcgen_convert.train import objective
from dcgen_convert.train.phases import sampling_of

PICTURES = 32
T = 0.3  # little noise: what is compared is content. Of the noise levels that the network draws at
BASE, TARGET = "base", "target"  # whose latents


def measure(job: Job, converted: Path, rows: LatentCache, work: Path) -> list[float]:
    """Relative squared distance ||a - b||^2 / ||b||^2 of the image tokens after every block, in forward order.

    Args:
        converted: transformer folder.
        rows: of the first phase, which have latents of the base.
        work: folder that takes the tokens for a while.
    """
    device = pipelines.device()
    sums: list[Tensor] = []  # (blocks, 2) of every picture: squared distance and squared norm
    with TemporaryDirectory(prefix=TEMPORARY, dir=work) as folder:
        for index, tokens in walk(job, converted, rows, TARGET):
            save_tensors({str(block): part for block, part in enumerate(tokens)}, Path(folder, str(index)))
        for index, tokens in walk(job, job.source.transformer, rows, BASE):
            new = load_file(Path(folder, str(index)))
            parts = [squares(old.to(device), new[str(block)].to(device)) for block, old in enumerate(tokens)]
            sums.append(torch.stack(parts).cpu())
    distance, norm = reduce(torch.add, sums).unbind(1)
    return (distance / norm).tolist()


@torch.no_grad()
def walk(job: Job, transformer: Path, rows: LatentCache, side: str) -> Iterator[tuple[int, list[Tensor]]]:
    """(row, image tokens after every block) for up to PICTURES rows; the model is in memory during the walk only.

    Pictures of several shapes are taken in turn.

    Args:
        side: BASE or TARGET: whose latents the model in the folder ``transformer`` sees.
    """
    model = models.load(transformer, job.dtype, device=pipelines.device())
    low, high = job.expert.within
    for index in (index for part in buckets.first_of_each(rows.spans, PICTURES) for index in part):
        latent, text = rows.seen(side, [index])
        sampling = sampling_of(job.family, job.recipe.adapt, latent.shape[1:], model.config, job.scheduler)
        drawn = objective.draw(job.recipe.seed, 0, [index], latent.shape[1:], sampling, objective.EVALUATION)
        drawn = replace(drawn, t=torch.full((1,), low + T * (high - low)))
        with clock.timed("gap"):
            tokens = block_tokens(job.family, model, *objective.to_device((latent, text, drawn), pipelines.device()))
        yield index, tokens
        pulse.bump()


def squares(old: Tensor, new: Tensor) -> Tensor:
    """(2,) float64: squared distance of the maps (B, D, rows, cols), ``old`` pooled onto the grid of ``new``, and
    squared norm. Float32 arithmetic. Maps of videos are (B, D, frames, rows, cols).
    """
    goal = pooled(old.float(), new.shape[2:])
    return torch.stack([part.double().square().sum() for part in (new.float() - goal, goal)])


def block_tokens(
    family: Family, model: Network, z0: Tensor, text: dict[str, Tensor], drawn: objective.Draws
) -> list[Tensor]:
    """Image tokens after every block at the drawn noise, each as a map (B, D, rows, cols) on the CPU, in the model's
    dtype.
    """
    grid = family.grid(z0.shape[2:], family.patch(model.config, z0.shape[1]))
    blocks = family.block_modules(model)
    outputs: dict[nn.Module, list[Tensor]] = {block: [] for block in blocks}  # a family may split the batch

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        outputs[module].append(family.block_map(output, grid, text).cpu())

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        z = objective.noised(z0, drawn.eps, drawn.t)
        objective.predict(family, model, z, drawn.t, text, torch.ones_like(drawn.t))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts).contiguous() for parts in outputs.values()]
