"""Per-block representation gap: how far the converted model's image tokens are from the base model's, block by block.

The paper's own sign of alignment: distance after block 0 / 5 / 10 / 15 of FLUX falls from 0.24 / 4.88 / 53.6 / 345 to
0.02 / 0.37 / 2.24 / 12.5. Both models see the same pictures at the same t, each with noise of its own latent space; the
base's tokens are average-pooled onto the converted grid. Pictures of several shapes are taken in turn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgen_convert import models, pipelines
from dcgen_convert.data import buckets
from dcgen_convert.data.cache import LatentCache
from dcgen_convert.train import objective
from dcgen_convert.train.adapt import sampling_of

PICTURES = 32
T = 0.3  # little noise: what is compared is content


@torch.no_grad()
def measure(job, converted: nn.Module, rows: LatentCache) -> list[float]:
    """Relative squared distance ||a - b||^2 / ||b||^2 of the image tokens after every block, in forward order."""
    base = models.load(job.source.transformer, pipelines.DTYPES[job.recipe.dtype], device=pipelines.device())
    sums: list[Tensor] = []  # (blocks, 2) of every shape: squared distance and squared norm
    for indices in buckets.first_of_each(rows.spans, PICTURES):
        text = rows.batch(indices)[1]
        z_base, z = rows.pairs(indices)
        t = torch.full((len(indices),), T)
        tokens: list[list[Tensor]] = []
        for model, latent in ((base, z_base), (converted, z)):
            sampling = sampling_of(job.family, job.recipe.adapt, latent.shape[1:], model.config, job.scheduler)
            drawn = objective.draw(job.recipe.seed, 0, indices, latent.shape[1:], sampling, objective.EVALUATION)
            patch = job.family.patch(model.config, latent.shape[1])
            grid = (latent.shape[2] // patch, latent.shape[3] // patch)
            tokens.append(block_tokens(job.family, model, objective.noised(latent, drawn.eps, t), t, text, grid))
        goals = [F.interpolate(old, size=tuple(new.shape[-2:]), mode="area") for old, new in zip(*tokens, strict=True)]
        pairs = [((new - goal), goal) for new, goal in zip(tokens[1], goals, strict=True)]
        sums.append(torch.tensor([[part.double().square().sum().item() for part in pair] for pair in pairs]))
    distance, norm = sum(sums).unbind(1)
    return (distance / norm).tolist()


def block_tokens(
    family, model: nn.Module, z: Tensor, t: Tensor, text: dict[str, Tensor], grid: tuple[int, int]
) -> list[Tensor]:
    """Image tokens after every block, each as a map (B, D, rows, cols)."""
    blocks = family.block_modules(model)
    outputs: dict[nn.Module, list[Tensor]] = {block: [] for block in blocks}  # a family may split the batch

    def keep(module: nn.Module, args: tuple, output) -> None:
        outputs[module].append(family.block_map(output, grid, text).float())

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        objective.predict(family, model, z, t, text, torch.ones(len(z)))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in outputs.values()]
