"""How many pictures the regression of the embedder needs: by how much its error on held-out pictures lies above that of
the regression on all pictures, for 32 of them, 64, ... (the mean of several draws), in finished runs. Beside it what
rows that do not hang together would give: K inputs / rows. No stage of the runs is changed.

python tests/benchmarks/embedder_rows.py RUN ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dcgen_convert import conversion
from dcgen_convert.core.console import NULL
from dcgen_convert.core.journal import Run
from dcgen_convert.networks import models
from dcgen_convert.stages.align_embedder import Problem, embedding
from dcgen_convert.stages.job import prepare
from dcgen_convert.train.ridge import NormalEquations

DRAWS = 8
BATCH = 256


def main(folder: Path) -> None:
    job = prepare(conversion.recorded(folder)[0], Run(folder, NULL), NULL)
    settings, cache = job.recipe.align_embedder, job.rows(job.recipe.adapt.phases[0].resolution).paired()
    places = (job.source.transformer, job.folders.surgery / models.TRANSFORMER)
    networks = (embedding(place, job.family.embedder) for place in places)
    problem = Problem(job, *networks, cache, settings.pooling or "average")
    seen, unseen = cache.split()
    x, y = (torch.cat(part) for part in zip(*tokens(problem, seen), strict=True))
    other = sums(*(torch.cat(part) for part in zip(*tokens(problem, unseen), strict=True)))
    whole = other.mse(*sums(x, y).solve(settings.ridge, problem.biased))
    count, each, inputs = x.shape
    print(
        f"{job.recipe.name}: {count} pictures of {each} tokens, {inputs} inputs, {y.shape[2]} outputs; MSE on "
        f"{len(unseen)} held-out pictures {whole:.5g}"
    )
    generator, number = torch.Generator().manual_seed(0), 32
    while number <= count // 2:
        excess = torch.zeros(DRAWS)
        for draw in range(DRAWS):
            rows = torch.randperm(count, generator=generator)[:number]
            excess[draw] = other.mse(*sums(x[rows], y[rows]).solve(settings.ridge, problem.biased)) / whole - 1
        apart = inputs / (number * each)
        print(
            f"{number:6d} pictures, {number * each / inputs:7.1f} rows per input: {excess.mean():+8.2%}, largest "
            f"{excess.max():+8.2%}; apart {apart:.2%}, {excess.mean() / apart:.1f} times",
            flush=True,
        )
        number *= 2


def tokens(problem: Problem, cache):
    for span in cache.spans:
        for start in range(0, len(span), BATCH):
            yield problem.rows(list(span)[start : start + BATCH], cache)


def sums(x: torch.Tensor, y: torch.Tensor) -> NormalEquations:
    found = NormalEquations(x.shape[-1], y.shape[-1])
    for start in range(0, len(x), BATCH):
        found.add(x[start : start + BATCH], y[start : start + BATCH])
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(Path(name).resolve())
