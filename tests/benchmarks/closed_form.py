"""Closed-form embedder against the published 20,000 steps of AdamW, on the latents of a finished run: MSE and time.

python tests/benchmarks/closed_form.py RUN
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import read_json
from dcgen_convert.core.journal import Run
from dcgen_convert.core.names import RECIPE
from dcgen_convert.networks import models
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages.align_embedder import Problem, descend, embedding, xavier
from dcgen_convert.stages.job import prepare

STEPS, RATE, BATCH = 20_000, 1e-4, 64  # arXiv 2509.25180


def main(folder: Path) -> None:
    run = Run(folder, NULL)
    job = prepare(Resolved(Recipe.model_validate(read_json(folder / RECIPE)["recipe"]), {}), run, NULL)
    teacher = embedding(job.source.transformer, job.family.embedder)
    student = embedding(job.folders.surgery / models.TRANSFORMER, job.family.embedder)
    problem = Problem(job, teacher, student, job.rows(job.resolution).paired(), "average")
    started = time.perf_counter()
    equations = problem.equations(BATCH)
    weight, bias = equations.solve(job.recipe.align_embedder.ridge)
    closed = time.perf_counter() - started
    started = time.perf_counter()
    start = xavier(student.get_submodule(job.family.embedder), 0)
    descended = descend(problem, start, STEPS, RATE, BATCH, 0)
    slow = time.perf_counter() - started
    print(f"closed form: MSE {equations.mse(weight, bias):.6f} in {closed:.3f} s (reading the latents included)")
    print(f"AdamW, {STEPS} steps: MSE {equations.mse(*descended):.6f} in {slow:.1f} s: {slow / closed:.0f} x the time")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
