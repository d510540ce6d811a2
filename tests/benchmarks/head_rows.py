"""How many rows the least squares of the head needs: the held-out loss of finished runs with 16 rows per input, 32, ...
and all, and where the rule ends. No stage of the runs is changed.

python tests/benchmarks/head_rows.py RUN ...
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from dcgen_convert import conversion
from dcgen_convert.core import names
from dcgen_convert.core.console import NULL
from dcgen_convert.core.journal import Run
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe.head_rows import reason_to_end
from dcgen_convert.stages import align_head
from dcgen_convert.stages.head_fit import HeadFit, Ledger
from dcgen_convert.stages.job import prepare
from dcgen_convert.train import phases


class Bar:
    """Shows nothing."""

    def advance(self, n: int = 1, **info: object) -> None:
        return None


@torch.no_grad()
def main(folder: Path) -> None:
    run = Run(folder, NULL)
    job = prepare(conversion.recorded(folder)[0], run, NULL)
    rows, held_out = job.rows(job.recipe.adapt.phases[0].resolution).split()
    model = align_head.surgical(job, job.folders.align_embedder / names.MODULES, pipelines.device())
    task = phases.Task(model, job.family, job.recipe.adapt, rows, job.scheduler)
    head, ended = model.get_submodule(job.family.head), False
    with tempfile.TemporaryDirectory() as sums:
        fit = HeadFit(job, task, held_out, Path(sums))
        ledger = Ledger.open(fit)
        print(f"{job.recipe.name}: {fit.inputs} inputs, {len(rows)} pictures, {fit.rows[0]} held-out rows decide")
        for number in range(len(fit.parts)):
            with fit.listening():
                fit.own_sums(number, Bar())
            ledger.add(number)
            if number:
                weight, bias = ledger.solution
                head.weight[: len(weight)].copy_(weight.reshape(-1, *head.weight.shape[1:]))
                head.bias[: len(bias)].copy_(bias)
                loss, taken = align_head.heldout_loss(job, task, held_out), sum(fit.rows[1 : number + 1])
                ends = not ended and reason_to_end(ledger.losses, number + 1 == len(fit.parts))
                ended = ended or bool(ends)
                print(
                    f"{taken:8d} rows, {taken / fit.inputs:6.1f} per input: {ledger.losses[-1]:.4f}, of the model "
                    f"{loss:.4f}" + (f"  <- ends: {ends}" if ends else "")
                )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(Path(name).resolve())
