"""The least squares of the head: as many rows as it needs, shared over the ranks, kept on disk.

A sample is a picture with one draw of noise, t, guidance and caption. Each of its tokens is a row: the features before
the head, and the native target. Samples come in units of one picture size. Their order is a fixed shuffle in which
every picture comes once before one comes again, so that what comes first stands for all.

The units form parts: the held-out ones, then as many as the first solution needs, then for every next solution as many
as there were before. Within a part every rank sums its own units: of R ranks, rank r takes every R-th unit, from the
r-th on. Rank 0 adds up the ranks' sums in their order, solves, and decides by the held-out loss whether another part
follows (recipe/head_rows.py). The held-out loss of a linear head follows from the sums of the held-out rows, without
the network.

A rank writes its sums from time to time, rank 0 writes those of all after every part. So a run that was cut off goes on
in the middle of a part, to the same bits. With another number of ranks, or other rows, it goes on at the last finished
part, or at the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dcgen_convert.core import clock
from dcgen_convert.core.files import atomic_save, fresh_folder
from dcgen_convert.core.journal import fingerprint
from dcgen_convert.core.progress import Bar
from dcgen_convert.data.cache import LatentCache
from dcgen_convert.families import Text
from dcgen_convert.networks import pipelines
from dcgen_convert.networks.at_once import AtOnce
from dcgen_convert.recipe.head_rows import HELD_OUT, UNIT, ends, reason_to_end, useful_draws
from dcgen_convert.stages.align_embedder import linear
from dcgen_convert.stages.job import Job
from dcgen_convert.train import distributed, objective, phases
from dcgen_convert.train.loop import Samples
from dcgen_convert.train.objective import Draws
from dcgen_convert.train.ridge import NormalEquations

RIDGE = 1e-6  # relative: the features of a finite sample are nearly collinear
SUMS = "least-squares"  # folder of the sums while they grow
WHOLE = "sums.safetensors"
SAVE_SECONDS = 60.0  # of work that a rank may lose
DRAW_STREAM = 1 << 30  # first step of the closed form's draws: no training run reaches it, so no draw comes twice
SHUFFLE = 2  # stream of random numbers beside objective.TRAINING and EVALUATION


@dataclass(frozen=True)
class Unit:
    """Samples of one size: ``rows`` of the training rows with draw ``number``, or held-out rows at that quantile."""

    number: int
    rows: list[int]
    held_out: bool = False


def shuffled(spans: Sequence[range], draws: int, seed: int) -> list[Unit]:
    """The training rows, ``draws`` times, in units whose order is shuffled anew for every draw."""
    units = []
    for number in range(draws):
        generator = np.random.Generator(np.random.Philox(key=[seed, SHUFFLE], counter=[0, 0, 0, number]))
        found = []
        for span in spans:
            rows = (span.start + generator.permutation(len(span))).tolist()
            found += [Unit(number, rows[at : at + UNIT]) for at in range(0, len(rows), UNIT)]
        units += [found[place] for place in generator.permutation(len(found))]
    return units


def held_out(spans: Sequence[range]) -> list[Unit]:
    """Up to HELD_OUT rows from everywhere in ``spans``, at every quantile of t."""
    every = -(-sum(map(len, spans)) // HELD_OUT)
    kept = [[row for row in span if row % every == 0] for span in spans]
    batches = [rows[at : at + UNIT] for rows in kept for at in range(0, len(rows), UNIT)]
    return [Unit(number, rows, True) for number in range(len(objective.QUANTILES)) for rows in batches]


def _cells(shape: Sequence[int]) -> int:
    """Rows of a latent of ``shape`` (C, h, w): the head's patch is 1."""
    return math.prod(shape[1:])


class HeadFit:
    """The units of one job, what they add to the equations, and the files that hold the sums. Every rank makes one.

    Attributes:
        parts: the units of each part; the first part is held out.
        rows: of each part.
        inputs: K, numbers per row.
    """

    def __init__(self, job: Job, task: phases.Task, unseen: LatentCache, folder: Path) -> None:
        self.job, self.task, self.unseen, self.folder = job, task, unseen, folder / SUMS
        self.head = linear(task.model, job.family.head)
        self.inputs = self.head.weight[0].numel()
        every = sum(len(span) * _cells(shape) for span, shape in zip(task.rows.spans, task.rows.shapes, strict=True))
        draws = useful_draws(job.recipe.align_head.draws, every, self.inputs)
        units = shuffled(task.rows.spans, draws, job.recipe.seed)
        bounds = [0, *ends([self._count(unit) for unit in units], self.inputs)]
        self.parts = [held_out(unseen.spans), *(units[a:b] for a, b in pairwise(bounds))]
        self.rows = [sum(map(self._count, part)) for part in self.parts]
        self.key = fingerprint([task.rows.spans, task.rows.shapes, [*unseen.rows]])[:16]  # names the rows
        self._features: list[Tensor] = []
        self._null = objective.Resident(task.rows.null)
        self._halving = AtOnce("align head: least squares", job.console.warn)

    def _cache(self, unit: Unit) -> Samples:
        return self.unseen if unit.held_out else self.task.rows

    def _count(self, unit: Unit) -> int:
        """Rows of a unit."""
        cache = self._cache(unit)
        number = next(number for number, span in enumerate(cache.spans) if unit.rows[0] in span)
        return len(unit.rows) * _cells(cache.shapes[number])

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, what the head is given is kept."""
        handle = self.head.register_forward_pre_hook(lambda _, args: self._features.append(args[0].detach()))
        try:
            yield
        finally:
            handle.remove()

    def add(self, equations: NormalEquations, unit: Unit) -> None:
        """The rows of a unit, at most ``latents.batch`` pictures at once, and fewer where memory is short."""
        cache, recipe = self._cache(unit), self.job.recipe

        def found(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            z0, text = cache.batch(rows)
            shape, sampling = z0.shape[1:], self.task.sampling(z0.shape[1:])
            if unit.held_out:
                drawn = objective.draw_evaluation(recipe.seed, unit.number, rows, shape, sampling)
            else:
                drawn = objective.draw(recipe.seed, DRAW_STREAM + unit.number, rows, shape, sampling)
            with clock.timed("start", len(rows)):
                return self._rows(*objective.to_device((z0, text, drawn), pipelines.device()))

        for part in self._halving.parts(unit.rows, found, recipe.latents.batch):
            with clock.timed("sum", len(part[0])):
                equations.add(*part)

    def _rows(self, z0: Tensor, text: Text, drawn: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, N, K), goals (B, N, C) and weights (B, N) of pictures."""
        family, adapt, null = self.job.family, self.job.recipe.adapt, self._null.on(z0.device)
        z = objective.noised(z0, drawn.eps, drawn.t)
        x = self._seen(z, drawn.t, objective.drop_text(text, null, drawn.dropped), drawn.guidance)
        if adapt.objective == "guidance-corrected":
            nothing = objective.drop_text(text, null, torch.ones_like(drawn.dropped))
            x_null = self._seen(z, drawn.t, nothing, torch.ones_like(drawn.guidance))
            x = objective.corrected(x, x_null, drawn.guidance, adapt.data_guidance)
        goal = family.target(z0, drawn.eps).flatten(2).transpose(1, 2)
        weight = objective.error_weight(family, drawn.t, adapt.weighting)
        return x, goal, weight[:, None].expand(goal.shape[:2])

    def _seen(self, z: Tensor, t: Tensor, text: Text, guidance: Tensor) -> Tensor:
        self._features.clear()
        objective.predict(self.job.family, self.task.model, z, t, text, guidance)
        features = torch.cat(self._features)
        return self.job.family.head_inputs(features, _cells(z.shape[1:]), text).float()

    def own_sums(self, number: int, bar: Bar) -> None:
        """Write this rank's sums of part ``number``; what it has written of them already is kept."""
        crew = self.job.crew
        units, path = self.parts[number][crew.rank :: crew.world], self.part(number, crew.rank)
        equations, done = NormalEquations(self.inputs, self.task.rows.shapes[0][0], pipelines.device()), 0
        if path.exists():
            found = load_file(path)
            equations, done = NormalEquations.of(found, pipelines.device()), int(found["done"])
        bar.advance(sum(len(unit.rows) for unit in units[:done]))
        saved = time.monotonic()
        for place, unit in enumerate(units[done:], done + 1):
            self.add(equations, unit)
            bar.advance(len(unit.rows))
            if place < len(units) and time.monotonic() - saved > SAVE_SECONDS:
                self._save(equations, place, path)
                saved = time.monotonic()
        self._save(equations, len(units), path)

    def _save(self, equations: NormalEquations, done: int, path: Path) -> None:
        atomic_save({**equations.tensors(), "done": torch.tensor(done)}, path)

    def part(self, number: int, rank: int) -> Path:
        """File of a rank's sums; those of another number of ranks have other names."""
        return self.folder / self.key / f"part-{number}-rank-{rank}-of-{self.job.crew.world}.safetensors"

    def all_sums(self, number: int) -> NormalEquations:
        """The sums of all ranks of part ``number``, in their order; on the CPU."""
        parts = [NormalEquations.of(load_file(self.part(number, rank))) for rank in range(self.job.crew.world)]
        return sum(parts[1:], parts[0])


@dataclass
class Ledger:
    """What rank 0 knows of a fit: sums of all finished parts, and the held-out loss of every solution.

    Attributes:
        begun: number of finished parts.
    """

    fit: HeadFit
    unseen: NormalEquations | None = None
    seen: NormalEquations | None = None
    losses: list[float] = field(default_factory=list)
    solution: tuple[Tensor, Tensor] | None = None

    @classmethod
    def open(cls, fit: HeadFit) -> Ledger:
        """What an interrupted run has left; sums of other rows are deleted."""
        folder = fit.folder / fit.key
        if not folder.exists():
            fresh_folder(fit.folder)
            folder.mkdir()
        ledger = cls(fit)
        if (folder / WHOLE).exists():
            found = load_file(folder / WHOLE)
            kinds = {
                kind: {name.removeprefix(f"{kind}."): value for name, value in found.items() if name.startswith(kind)}
                for kind in ("unseen", "seen")
            }
            ledger.losses = found["losses"].tolist()
            ledger.unseen = NormalEquations.of(kinds["unseen"])
            if ledger.losses:
                ledger.seen = NormalEquations.of(kinds["seen"])
                ledger._solve()
        return ledger

    @property
    def begun(self) -> int:
        return 0 if self.unseen is None else 1 + len(self.losses)

    @property
    def reason(self) -> str | None:
        """Why the fit has ended, in words; None: it has not."""
        return reason_to_end(self.losses, self.begun == len(self.fit.parts))

    def add(self, number: int) -> None:
        """Take up part ``number``, which every rank has summed."""
        found = self.fit.all_sums(number)
        if self.unseen is None:
            self.unseen = found
        else:
            self.seen = found if self.seen is None else self.seen + found
            weight = self.unseen.count.item() / self.fit.rows[0]  # of a row, in the mean
            self.losses.append(weight * self.unseen.mse(*self._solve()))
            rows, inputs = sum(self.fit.rows[1 : number + 1]), self.fit.inputs
            self.fit.job.console.say(
                f"align head: {rows:,} rows, {rows / inputs:.3g} per input of the head: "
                f"held-out loss {self.losses[-1]:.4f}"
            )
        self._save()
        for rank in range(self.fit.job.crew.world):
            self.fit.part(number, rank).unlink()

    def _solve(self) -> tuple[Tensor, Tensor]:
        assert self.seen is not None, "rows were added"
        self.solution = self.seen.solve(RIDGE, bias=self.fit.head.bias is not None)
        return self.solution

    def _save(self) -> None:
        kinds = {"unseen": self.unseen, "seen": self.seen}
        tensors = {
            f"{kind}.{name}": value
            for kind, sums in kinds.items()
            if sums is not None
            for name, value in sums.tensors().items()
        }
        losses = torch.tensor(self.losses, dtype=torch.float64)
        atomic_save({**tensors, "losses": losses}, self.fit.folder / self.fit.key / WHOLE)


@torch.no_grad()
def work(fit: HeadFit, bar: Bar, begun: int, ledger: Ledger | None = None) -> None:
    """Sum parts until rank 0 has enough of them. Every rank calls it.

    Args:
        begun: number of finished parts, as rank 0 knows it.
        ledger: on rank 0.
    """
    device = torch.device(pipelines.device())
    with fit.listening():
        for number in range(begun, len(fit.parts)):
            fit.own_sums(number, bar)
            distributed.agree(True, device)  # all sums are written
            if ledger is not None:
                ledger.add(number)
            if distributed.of_rank_0(int(ledger is not None and ledger.reason is not None), device):
                return
