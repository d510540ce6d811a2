"""What else could train better: one change of the quick recipe's training in each row, in one table.

    PYTHONPATH=. python tests/benchmarks/tries.py WORK [ROW ...] [--steps N] [--batch N] [--seeds N]

tiny-flux to f32. Sources, pictures, latents and the alignment of a seed are made once, by the real command. Then every
row trains in a plain loop with the tool's own losses, draws, order of rows, LoRA and orthogonal steps, from the same
start, and is judged on 512 prompts. Some of the rows need what the tool does not have. WORK/tries.jsonl keeps the
rows that are done. CPU seconds are those of the training alone, on one thread: a row may look at more in a step.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conversion import convert
from torch import Tensor, nn
from torch.nn import functional as F

from dcgen_convert import conversion
from dcgen_convert.core import names
from dcgen_convert.core.console import NULL
from dcgen_convert.core.journal import Run
from dcgen_convert.data import prompts
from dcgen_convert.evaluation import tiny_world
from dcgen_convert.families.base import Network
from dcgen_convert.networks import autoencoders, models, pipelines
from dcgen_convert.stages import grid
from dcgen_convert.stages.job import Job, prepare
from dcgen_convert.train import lora, objective, phases
from dcgen_convert.train.objective import Draws, predict
from dcgen_convert.train.order import BatchOrder
from dcgen_convert.train.ridge import NormalEquations
from tools.tiny.loop import Orthogonal

PROMPTS, PROMPTS_SEED, TOGETHER = 512, 987_654, 64
WARMUP, RATE, HELD = 20, 3e-3, 64
REFITS = 40  # batches for the last least squares of the head
HEAD = "| row, seed | held-out loss | accuracy | Frechet | CPU s |\n|---|---|---|---|---|"
Text = dict[str, Tensor]


@dataclass(frozen=True)
class Try:
    """A training. Without arguments: that of the quick recipe."""

    everything: bool = False  # every weight in place of LoRA
    rank: int = 64
    scale: float = 1.0  # alpha / rank
    rate: float = RATE
    b_rate: float = 1.0  # of LoRA's B, in rates of A (LoRA+, arXiv 2402.12354)
    principal: bool = False  # LoRA begins at the largest singular directions (PiSSA, arXiv 2404.02948)
    width: float = 1.0  # standard deviation of the logit of t
    spread: bool = False  # t and guidance of a batch lie evenly
    weigh: Callable[[Tensor], Tensor] = torch.ones_like  # t (B,) -> weight of the squared error
    ema: float = 0.99
    schedule_free: float = 0.0  # arXiv 2405.15682: where between the steps and their mean gradients are taken
    bands: bool = False  # two heads, for t below and above the middle
    features: float = 0.0  # weight of the distance of all blocks from the base's at the same t
    refit: bool = False  # the head's least squares once more at the end
    guidance: tuple[float, float] | None = None  # drawn from this range; None: the recipe's
    power: float = 0.0  # the squared error counts as this power of the guidance
    through: bool = False  # gradients through the velocity of the null prompt too


def min_snr(t: Tensor) -> Tensor:
    """Of an error of v: min(SNR, 5) of an error of the picture (arXiv 2303.09556)."""
    return torch.minimum((1 - t).square(), 5 * t.square())


ROWS = {
    "the recipe": Try(),
    "LoRA+: B at 2 x the rate": Try(b_rate=2),
    "LoRA+: B at 4 x, A at 1/2": Try(rate=RATE / 2, b_rate=8),
    "rsLoRA: alpha = 8 rank, rate / 3": Try(scale=8, rate=RATE / 3),
    "PiSSA": Try(principal=True),
    "two heads, by noise": Try(bands=True),
    "min-SNR-like weights": Try(weigh=min_snr),
    "wider noise levels": Try(width=1.3),
    "narrower noise levels": Try(width=0.75),
    "t and guidance spread evenly": Try(spread=True),
    "features of the base, weight .1": Try(features=0.1),
    "head refitted at the end": Try(refit=True),
    "schedule-free": Try(schedule_free=0.9),
    "EMA .999": Try(ema=0.999),
    "no EMA": Try(ema=0.0),
    "every weight": Try(everything=True, rate=2e-3),
    "every weight, guidance 3 to 4": Try(everything=True, rate=2e-3, guidance=(3, 4)),
    "every weight, guidance 1 to 4": Try(everything=True, rate=2e-3, guidance=(1, 4)),
    "every weight, guidance 3.5": Try(everything=True, rate=2e-3, guidance=(3.5, 3.5)),
    "every weight, error times guidance": Try(everything=True, rate=2e-3, power=1),
    "every weight, error times guidance squared": Try(everything=True, rate=2e-3, power=2),
    "every weight, gradients through the null prompt": Try(everything=True, rate=2e-3, through=True),
    "every weight, refitted, spread evenly": Try(everything=True, rate=2e-3, refit=True, spread=True),
}


class Bands(nn.Module):
    """Two copies of a head; `t` says which of them a row takes."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.low, self.high, self.t = head, deepcopy(head), torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        early = (self.t > self.middle)[:, None, None]
        return torch.where(early, self.high(x), self.low(x))

    middle = 0.5


class Training:
    """One row: the model, what trains, and the loop."""

    def __init__(self, job: Job, how: Try, batch: int, steps: int) -> None:
        self.job, self.how, self.steps, self.family = job, how, steps, job.family
        self.rows, self.held = job.rows(job.recipe.adapt.phases[0].resolution).split()
        model = models.load(job.folders.dense_before(1), torch.float32, job.folders.align_head / names.MODULES)
        self.model, self.seed = model, job.recipe.seed
        self.task = phases.Task(model, self.family, job.recipe.adapt, self.rows, job.scheduler)
        shape = self.rows.shapes[0]
        self.sampling = self.task.sampling(shape)  # of the recipe: the held-out loss of all rows is the same one
        self.drawing = replace(self.sampling, guidance_range=how.guidance or self.sampling.guidance_range)
        self.order = BatchOrder(self.rows.spans, batch, self.seed)
        self.null = self.rows.null
        heads = self.task.modules
        if how.bands:
            head = Bands(model.get_submodule(self.family.head))
            head.middle = objective.t_of_normal(torch.zeros(1, dtype=torch.float64), self.sampling).item()
            model.set_submodule(self.family.head, head)
            model.register_forward_pre_hook(
                lambda _, args, given: setattr(head, "t", given["timestep"]), with_kwargs=True
            )
        if not how.everything:
            start = (
                principal(model, lora.targeted(model, self.family.lora_targets), how.rank) if how.principal else None
            )
            lora.add_lora(model, self.family.lora_targets, how.rank, how.scale * how.rank, self.seed, start)
        model.requires_grad_(False)
        self.named = lora.trainable(model, heads, everything=how.everything)
        for _, value in self.named:
            value.requires_grad_(True)
        inside = tuple(f"{path}." for path in heads)
        turned = {name for name, value in self.named if value.ndim == 2 and not name.startswith(inside)}
        rates = {name: how.rate * (how.b_rate if ".lora_B." in name else 1) for name in turned}
        plain = [value for name, value in self.named if name not in turned]
        groups = [{"params": [value], "lr": rates[name]} for name, value in self.named if name in turned]
        betas = (0.0 if how.schedule_free else 0.9, 0.95)
        adamw = torch.optim.AdamW(plain, how.rate, betas=betas, weight_decay=0)
        self.optimizers = (Orthogonal(groups, how.rate, weight_decay=0), adamw)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(one, self.rate) for one in self.optimizers]
        self.base = models.load(job.source.transformer, torch.float32) if how.features else None

    def run(self) -> float:
        """Trains, leaves the averaged weights in the model; CPU seconds."""
        began, how = time.process_time(), self.how
        mean = [value.detach().clone() for _, value in self.named]
        steps = [value.clone() for value in mean]
        for step in range(self.steps):
            self.loss(step).backward()
            values = [value for _, value in self.named]
            nn.utils.clip_grad_norm_(values, 1.0)
            if how.schedule_free:
                put(values, steps)
            self.update()
            with torch.no_grad():
                if how.schedule_free:
                    put(steps, values)
                    torch._foreach_lerp_(mean, steps, 1 / max(1, step + 1 - WARMUP))
                    put(values, torch._foreach_lerp(steps, mean, how.schedule_free))
                else:
                    decay = min(how.ema, (1 + step) / (10 + step))
                    torch._foreach_lerp_(mean, [value.detach() for value in values], 1 - decay)
        put([value for _, value in self.named], mean)
        if how.refit:
            self.refit()
        return time.process_time() - began

    def rate(self, step: int) -> float:
        """Of this step, in rates of the row."""
        if self.how.schedule_free or step < WARMUP:
            return min(1.0, (step + 1) / WARMUP)
        return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (self.steps - WARMUP)))

    def update(self) -> None:
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def drawn(self, step: int, rows: list[int], z0: Tensor) -> Draws:
        how, shape = self.how, z0.shape[1:]
        found = objective.draw(self.seed, step, range(len(rows)), shape, self.drawing)
        if how.spread or how.width != 1:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            uniform = torch.rand(2, len(rows), generator=generator, dtype=torch.float64)
            if how.spread:
                order = torch.stack([torch.randperm(len(rows), generator=generator) for _ in range(2)])
                uniform = (order + uniform) / len(rows)
            t = objective.t_of_normal(torch.special.ndtri(uniform[0]) * how.width, self.sampling)
            low, high = self.drawing.guidance_range
            found = replace(found, t=t, guidance=(low + (high - low) * uniform[1]).float())
        return found

    def loss(self, step: int) -> Tensor:
        chosen = self.order.rows_of(step)
        z0, text = self.rows.batch(chosen)
        drawn = self.drawn(step, chosen, z0)
        nothing = objective.drop_text(text, self.null, torch.ones_like(drawn.dropped))
        z = objective.noised(z0, drawn.eps, drawn.t)
        with torch.set_grad_enabled(self.how.through):
            v_null = predict(self.family, self.model, z, drawn.t, nothing, torch.ones_like(drawn.guidance))
        seen = objective.drop_text(text, self.null, drawn.dropped)
        with listening(self.family, self.model, z0, text) if self.base else nothing_kept() as maps:
            v = predict(self.family, self.model, z, drawn.t, seen, drawn.guidance)
        error = (objective.corrected(v, v_null, drawn.guidance, 1.0) - self.family.target(z0, drawn.eps)).square()
        guided = drawn.guidance**self.how.power
        weights = self.how.weigh(drawn.t) * guided / guided.mean()
        loss = (weights * objective.mean_per_row(error)).mean()
        if self.base:
            loss = loss + self.how.features * self.distance(maps(), chosen, seen, drawn)
        return loss

    @torch.no_grad()
    def goals(self, chosen: list[int], seen: Text, drawn: Draws) -> list[Tensor]:
        """What the base's blocks make of the same pictures at the same t."""
        z0 = self.rows.pairs(chosen)[0]["z"]
        eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(self.seed + chosen[0]))
        with listening(self.family, self.base, z0, seen) as maps:
            predict(self.family, self.base, objective.noised(z0, eps, drawn.t), drawn.t, seen, drawn.guidance)
        return maps()

    def distance(self, maps: list[Tensor], chosen: list[int], seen: Text, drawn: Draws) -> Tensor:
        """Mean over the blocks of the squared distance of their tokens, relative to the base's."""
        parts = []
        for own, goal in zip(maps, self.goals(chosen, seen, drawn), strict=True):
            pooled = F.interpolate(goal, size=own.shape[2:], mode="area")
            parts.append((own - pooled).square().mean() / pooled.square().mean())
        return torch.stack(parts).mean()

    @torch.no_grad()
    def refit(self) -> None:
        head, kept = self.model.get_submodule(self.family.head), []
        handle = head.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
        equations = NormalEquations(head.weight.shape[1], head.weight.shape[0])
        for number in range(REFITS):
            step = self.steps + number
            chosen = self.order.rows_of(step)
            z0, text = self.rows.batch(chosen)
            drawn = self.drawn(step, chosen, z0)
            z = objective.noised(z0, drawn.eps, drawn.t)

            def features(dropped: Tensor, guidance: Tensor) -> Tensor:
                kept.clear()
                seen = objective.drop_text(text, self.null, dropped)  # noqa: B023  called at once
                predict(self.family, self.model, z, drawn.t, seen, guidance)  # noqa: B023
                return self.family.head_inputs(torch.cat(kept), math.prod(z.shape[2:]), seen)  # noqa: B023

            ones = torch.ones_like(drawn.dropped)
            null, guided = features(ones, torch.ones_like(drawn.guidance)), features(drawn.dropped, drawn.guidance)
            target = self.family.target(z0, drawn.eps).flatten(2).transpose(1, 2)
            equations.add(objective.corrected(guided, null, drawn.guidance, 1.0), target)
        handle.remove()
        weight, bias = equations.solve(1e-6)
        head.weight.copy_(weight)
        head.bias.copy_(bias)

    def held_out_loss(self) -> float:
        rows = list(range(HELD))
        batches = [(rows, *self.held.batch(rows))]
        return objective.evaluate_loss(self.task.loss(), batches, self.seed, self.task.sampling)["mean"]


def principal(model: Network, paths: list[str], rank: int) -> dict[str, Tensor]:
    """Where PiSSA begins: the `rank` largest singular directions of each weight, half of each value on either side."""
    found = {}
    for path in paths:
        left, values, right = torch.linalg.svd(model.get_submodule(path).weight.detach(), full_matrices=False)
        root = values[:rank].sqrt()
        found[f"{path}.A"] = (root[:, None] * right[:rank]).contiguous()
        found[f"{path}.B"] = (left[:, :rank] * root).contiguous()
    return found


@contextmanager
def listening(family: Any, model: Network, z0: Tensor, text: Text) -> Iterator[Callable[[], list[Tensor]]]:
    """Inside, what the blocks give for the image is kept as maps (B, D, rows, columns)."""
    size = family.grid(z0.shape[2:], family.patch(model.config, z0.shape[1]))
    kept: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, args, output: kept.append(family.block_map(output, size, text)))
        for block in family.block_modules(model)
    ]
    try:
        yield lambda: kept
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def nothing_kept() -> Iterator[Callable[[], list[Tensor]]]:
    yield list


@torch.no_grad()
def put(values: list[Tensor], others: list[Tensor]) -> None:
    for value, other in zip(values, others, strict=True):
        value.copy_(other)


@torch.no_grad()
def judged(training: Training) -> tuple[float, float]:
    """(accuracy, Frechet distance) on the prompts."""
    job, family, held = training.job, training.family, training.held
    captions = prompts.generated("tiny-world", PROMPTS, PROMPTS_SEED)
    pipeline = pipelines.load_text_encoders(job.source, torch.float32)
    text = pipelines.encode_text(family, pipeline, captions, job.text_length)
    codec, shape, settings = autoencoders.load(job.target), held.shapes[0], job.recipe.bundle
    levels = grid.noise_levels(family, settings.steps, math.prod(shape[1:]), job.scheduler)
    velocity, pictures = partial(objective.velocity, family, training.model), []
    for part in torch.arange(PROMPTS).split(TOGETHER):
        own = {key: value[part] for key, value in text.items()}
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(7 + int(i))) for i in part])
        pictures += list(codec.decode(grid.sample(velocity, noise, levels, own, own, settings.guidance, None)))
    shown = torch.stack(pictures).clamp(-1, 1)
    return tiny_world.accuracy(shown, captions), tiny_world.distance(shown, captions)


def prepared(work: Path, seed: int) -> Job:
    """The job of a conversion that was made until its alignment."""
    folder = work / f"common-{seed}"
    options = ["tiny-flux", "--ae", "tiny-dc-ae-f32", "--set", f"seed={seed}", "--until", "align-head"]
    if not (folder / "run" / "align-head" / "stage.json").exists():
        convert(folder, options, folder)
    return prepare(conversion.recorded(folder / "run")[0], Run(folder / "run", NULL), NULL)


def main(work: Path, chosen: list[str], steps: int, batch: int, seeds: int) -> None:
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "tries.jsonl"
    done = (
        {tuple(line["key"]): line["row"] for line in map(json.loads, file.read_text().splitlines())}
        if file.exists()
        else {}
    )
    print(HEAD, flush=True)
    for name in chosen or ROWS:
        for seed in range(seeds):
            key = (name, steps, batch, seed)
            if key not in done:
                training = Training(prepared(work, seed), ROWS[name], batch, steps)
                seconds = training.run()
                loss, (accuracy, frechet) = training.held_out_loss(), judged(training)
                done[key] = f"| {name}, {seed} | {loss:.4f} | {accuracy:.1%} | {frechet:.0f} | {seconds:.0f} |"
                with file.open("a") as lines:
                    lines.write(json.dumps({"key": key, "row": done[key]}) + "\n")
            print(done[key], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW")
    parser.add_argument("--steps", type=int, default=560)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    main(given.work, given.rows, given.steps, given.batch, given.seeds)
