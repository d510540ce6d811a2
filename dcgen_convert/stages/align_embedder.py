"""Stage `align-embedder`: the new patch embedder, fitted to the base model's patch embeddings of the same pictures.

Loss (stage 1 of arXiv 2509.25180): L = || e_new(z_dc) - AvgPool_s(e_base(z_base)) ||^2. Both sides are linear in the
latents, so one ridge regression over pictures of all shapes gives the optimum: over those that have latents of the
base. C and C0 are the channels, N and N0 the tokens (new, base), D is the width.

With the target "home" (recipe/alignment.py) z_base is of the picture at the size where N0 = N. Then s = 1: nothing is
pooled.
"""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgen_convert.core import clock, names
from dcgen_convert.core.console import Console
from dcgen_convert.core.files import atomic_save
from dcgen_convert.core.journal import Stage
from dcgen_convert.data import buckets
from dcgen_convert.data.cache import LatentCache
from dcgen_convert.families.base import Network
from dcgen_convert.families.tensors import pooled
from dcgen_convert.networks import models
from dcgen_convert.stages.job import Job
from dcgen_convert.svdquant import skeleton
from dcgen_convert.svdquant.source import read_folder
from dcgen_convert.train.ridge import NormalEquations

OVERFIT = 2.0  # warn above this ratio of held-out MSE to training MSE: the fit has too few rows
Affine = nn.Linear | nn.Conv2d | nn.Conv3d  # what an embedder or a head is
READ_ONCE = 1_000_000  # tokens of a cache that is small enough to be kept in memory


def run(job: Job, stage: Stage) -> None:
    """Writes modules.safetensors (the embedder); reports the MSE before, after, at the optimum and on held-out rows."""
    if job.keeps_latents:
        keep(job, stage)
        return
    settings = job.recipe.align_embedder
    resolution = job.recipe.adapt.phases[0].resolution
    cache = job.of_phase(1).rows(resolution).paired()
    teacher, student = (
        embedding(folder, job.family.embedder)
        for folder in (job.source.transformer, job.folders.surgery / models.TRANSFORMER)
    )
    problem = Problem(job, teacher, student, cache, settings.pooling or "average")

    seen, unseen = (problem.equations(job.recipe.latents.batch, part) for part in cache.split())
    equations = seen + unseen
    started = time.perf_counter()
    module = linear(student, job.family.embedder)
    start = xavier(module, job.recipe.seed)
    best = equations.solve(0.0, bias=problem.biased)
    weight, bias = start
    if settings.method == "ridge":
        weight, bias = equations.solve(settings.ridge, problem.biased)
        if seen.count:
            part = seen.solve(settings.ridge, problem.biased)
            stage.metrics.update(check_heldout(seen, unseen, part, job.console))
    elif settings.method == "adamw":
        weight, bias = descend(problem, start, settings.steps, settings.lr, settings.batch, job.recipe.seed)
    seconds = time.perf_counter() - started
    before, after, optimum = (equations.mse(*pair) for pair in (start, (weight, bias), best))
    stage.metrics.update(
        method=settings.method, mse_before=before, mse_after=after, mse_optimum=optimum, solve_seconds=round(seconds, 4)
    )
    stage.metrics.update(target=job.alignment.target, base_side=job.alignment.side)
    job.console.say(
        f"align embedder: {settings.method}, MSE {before:.5g} (Xavier) -> {after:.5g}, optimum {optimum:.5g}, "
        f"{seconds:.2f} s"
    )
    atomic_save(as_module(module, job.family.embedder, weight, bias), stage.folder / names.MODULES)


def keep(job: Job, stage: Stage) -> None:
    """Write the embedder of the source: it reads these latents already."""
    name = job.family.embedder
    module = linear(embedding(job.folders.surgery / models.TRANSFORMER, name), name)
    bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias.detach()
    atomic_save(as_module(module, name, module.weight.detach(), bias), stage.folder / names.MODULES)
    stage.metrics["method"] = "kept"
    job.console.say("align embedder: kept as it is")


def check_heldout(
    seen: NormalEquations, unseen: NormalEquations, solved: tuple[Tensor, Tensor], console: Console
) -> dict[str, float]:
    """MSE of a solution of ``seen`` on its own rows and on ``unseen``; a warning when it is overfitted.

    That happens at f128 with few pictures: there a picture of the tiny world is one token of 512 channels. Overfitted
    weights also enlarge the noise that training adds to the latents.
    """
    own, other = seen.mse(*solved), unseen.mse(*solved)
    if other > OVERFIT * own:
        console.warn(
            f"align embedder: {seen.count:.0f} tokens are few for {len(seen.x)} latent channels: MSE {other:.3g} on "
            f"held-out pictures, {own:.3g} on the others; draw more (data.count), or --set align_embedder.ridge=0.01"
        )
    return {"mse_seen": own, "mse_heldout": other}


class Problem:
    """Rows (x, y) of the regression: deep-latent tokens against the base model's embedded tokens, of paired rows."""

    def __init__(self, job: Job, teacher: Network, student: Network, cache: LatentCache, pooling: str) -> None:
        self.family, self.cache, self.pooling = job.family, cache, pooling
        self.teacher = linear(teacher, job.family.embedder)
        self.biased = self.teacher.bias is not None
        old, new = cache.pairs([0])
        self.patch_base = job.family.patch(teacher.config, old["z"].shape[1])
        self.patch = job.family.patch(student.config, new["z"].shape[1])
        self.base_positions = functools.cache(functools.partial(job.family.position_term, teacher))
        self.positions = functools.cache(functools.partial(job.family.position_term, student))

    @torch.no_grad()
    def rows(self, indices: list[int], cache: LatentCache | None = None) -> tuple[Tensor, Tensor]:
        """x (B, N', K) and y (B, N', D) of rows of one span of ``cache`` (None: all rows).

        N' is the number of tokens of the new grid (pooling "average") or of the base's grid ("bilinear"). For the
        target home both grids are the same.
        """
        z_base, z = (self.family.inputs(found["z"], found) for found in (cache or self.cache).pairs(indices))
        grid_base = self.family.grid(z_base.shape[2:], self.patch_base)
        grid = self.family.grid(z.shape[2:], self.patch)
        goal = affine(self.teacher, self.family.tokens(z_base, self.patch_base))  # (B, N0, D)
        if (added := self.base_positions(grid_base)) is not None:
            goal = goal + added
        x = self.family.tokens(z, self.patch)  # (B, N, K)
        own = self.positions(grid)  # the model adds them after the embedder: the embedder must not
        if self.pooling == "average":
            goal = resize(goal, grid_base, grid, "area")
        else:  # bilinear interpolation is linear too, so it may act on the inputs
            x = resize(x, grid, grid_base, "bilinear")
            own = None if own is None else resize(own[None], grid, grid_base, "bilinear")[0]
        return x, goal if own is None else goal - own

    def equations(self, batch: int, cache: LatentCache | None = None) -> NormalEquations:
        """The equations of the pictures of ``cache`` (None: all), read ``batch`` at a time."""
        x, y = self.rows([0])
        equations = NormalEquations(x.shape[-1], y.shape[-1])
        for part in buckets.batches((cache or self.cache).spans, batch):
            with clock.timed("read latents", len(part)):
                found = self.rows(list(part), cache)
            with clock.timed("sum", len(part)):
                equations.add(*found)
        return equations


def resize(tokens: Tensor, grid: tuple[int, ...], to: tuple[int, ...], mode: str) -> Tensor:
    """(B, N, K) on ``grid`` -> (B, N', K) on ``to``; mode "area" | "bilinear", which of videos is trilinear."""
    maps = tokens.unflatten(1, grid).movedim(-1, 1)
    if mode == "area":
        resized = pooled(maps, to)
    else:
        resized = F.interpolate(maps, size=to, mode=mode if len(to) == 2 else "trilinear", align_corners=False)
    return resized.movedim(1, -1).flatten(1, -2)


def embedding(folder: Path, embedder: str) -> Network:
    """The transformer in ``folder`` with only its embedder and the positions beside it in memory, float32.

    Args:
        embedder: module name. All positions that a family adds lie in the model's part that holds it.
    """
    config, entries = read_folder(folder)
    model, part = skeleton.build(config), embedder.partition(".")[0]
    skeleton.load(model.get_submodule(part), part, entries, "cpu", torch.float32)
    return model


def linear(model: nn.Module, path: str) -> Affine:
    """The linear or convolution at ``path``, which an embedder or a head is."""
    module = model.get_submodule(path)
    assert isinstance(module, Affine), f"{path} is a {type(module).__name__}"
    return module


def affine(module: Affine, tokens: Tensor) -> Tensor:
    """The embedder on tokens. A convolution is a linear on the flattened windows that it reads."""
    return F.linear(tokens, module.weight.flatten(1), module.bias)


def xavier(module: Affine, seed: int) -> tuple[Tensor, Tensor]:
    """Xavier-uniform weight and zero bias: what the authors start from."""
    weight = torch.empty(module.weight.flatten(1).shape, dtype=torch.float32)
    nn.init.xavier_uniform_(weight, generator=torch.Generator().manual_seed(seed))
    return weight, torch.zeros(len(weight))


def as_module(module: Affine, name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """State-dict entries of the embedder in its own shape, float32."""
    state = {f"{name}.weight": weight.float().reshape(module.weight.shape)}
    return state if module.bias is None else {**state, f"{name}.bias": bias.float()}


def descend(
    problem: Problem, start: tuple[Tensor, Tensor], steps: int, lr: float, batch: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The published way: AdamW (0.9, 0.95), no weight decay, constant rate, on batches of pictures of any shapes."""
    weight, bias = (nn.Parameter(value.clone()) for value in start)
    bias.requires_grad_(problem.biased)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    spans, shapes = problem.cache.spans, problem.cache.shapes
    known: dict[int, tuple[Tensor, Tensor]] = {}
    if sum(len(span) * math.prod(shape[1:]) for span, shape in zip(spans, shapes, strict=True)) < READ_ONCE:
        known = {span.start: problem.rows(list(span)) for span in spans}
    for _ in range(steps):
        drawn, parts = torch.randint(len(problem.cache), (batch,), generator=generator), []
        for span in spans:
            indices = drawn[(drawn >= span.start) & (drawn < span.stop)]
            if len(indices) and known:
                parts.append([rows[indices - span.start].flatten(0, 1) for rows in known[span.start]])
            elif len(indices):
                parts.append([rows.flatten(0, 1) for rows in problem.rows(indices.tolist())])
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        loss = F.mse_loss(F.linear(x, weight, bias), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return weight.detach(), bias.detach()
