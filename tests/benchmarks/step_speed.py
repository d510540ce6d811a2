"""Time of one denoising step: the source against the converted model, at the same number of pixels.

Both run in one process, in turns. The ratio of their tokens is printed too.

python tests/benchmarks/step_speed.py RUN [BATCH]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import read_json
from dcgen_convert.core.journal import Run
from dcgen_convert.core.names import RECIPE
from dcgen_convert.networks import models
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages.job import prepare

ROUNDS = 30


@torch.no_grad()
def measured(folder: Path, batch: int) -> tuple[float, float, list[int], int]:
    """(seconds of a step before, after; image tokens before and after; text tokens) of the conversion in the run
    ``folder``.
    """
    job = prepare(Resolved(Recipe.model_validate(read_json(folder / RECIPE)["recipe"]), {}), Run(folder, NULL), NULL)
    rows = job.rows(job.resolution)
    indices = list(range(batch))
    target, text = rows.batch(indices)
    side = job.resolution // job.identity.grid.f  # the base's own latents in the run may be of smaller pictures
    latents = torch.randn(batch, job.identity.grid.c, side, side), target
    pair = [models.load(job.source.transformer, job.dtype), models.load(job.folders.converted, job.dtype)]
    times: list[list[float]] = [[], []]
    tokens = [
        z.shape[2] * z.shape[3] // job.family.patch(m.config, z.shape[1]) ** 2
        for z, m in zip(latents, pair, strict=True)
    ]
    for _ in range(ROUNDS):
        for model, z, spent in zip(pair, latents, times, strict=True):
            started = time.perf_counter()
            job.family.predict(model, z.to(job.dtype), torch.full((batch,), 0.5), text, torch.full((batch,), 3.5))
            spent.append(time.perf_counter() - started)
    before, after = (statistics.median(spent) for spent in times)
    length = next(iter(text.values())).shape[1] if text[job.family.text_keys[0]].ndim > 1 else 0
    return before, after, tokens, length


def main(folder: Path, batch: int) -> None:
    before, after, tokens, length = measured(folder, batch)
    print(f"batch {batch}: {before * 1e3:.1f} ms -> {after * 1e3:.1f} ms per step: {before / after:.2f} x")
    print(
        f"image tokens {tokens[0]} -> {tokens[1]}: {tokens[0] / tokens[1]:.1f} x; with {length} text tokens "
        f"{(tokens[0] + length) / (tokens[1] + length):.2f} x"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16)
