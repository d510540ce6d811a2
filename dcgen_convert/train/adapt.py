"""Stages 2 and 3: align the head (embedder + head, blocks frozen), then adapt (LoRA or full phases).

Both are one procedure: choose what trains, choose the objective, run the loop, export the averaged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import RecipeError
from dcgen_convert.core.files import read_json, write_json
from dcgen_convert.data import buckets
from dcgen_convert.families import Family, Text
from dcgen_convert.recipe.schema import layout_names
from dcgen_convert.train import distributed, loop, lora
from dcgen_convert.train.engine import Engine
from dcgen_convert.train.loop import Saving
from dcgen_convert.train.meter import meter_of
from dcgen_convert.train.objective import (
    Draws,
    Sampling,
    consistency_loss,
    evaluate_loss,
    flow_loss,
    flux2_shift,
    guidance_corrected_loss,
    velocity,
)
from dcgen_convert.train.settings import EngineSettings
from dcgen_convert.train.watch import NONE, Intervals, Watch

LAYOUT = layout_names("adapt")  # settings that do not change the loss curve
MOMENT_SAVING = Saving(steps=0, minutes=10)  # a kill costs ten minutes at most


def train_head(
    model: nn.Module,
    family: Family,
    align: Any,
    adapt: Any,
    cache: Any,
    folder: Path,
    *,
    scheduler: dict[str, Any],
    dtype: str,
    micro_batch: int,
    console: Console = NULL,
    seed: int = 0,
    saving: Saving = MOMENT_SAVING,
    held_out: Any | None = None,
) -> dict[str, Any]:
    """Train embedder and head with the blocks frozen (arXiv 2509.25180, stage 2). Arguments and result as
    `adapt_phase`.

    Args:
        align: steps, lr, batch, warmup, clip of the stage (recipe section ``align_head``).
        adapt: what all training shares: objective, ema, ZeRO stage, ... (recipe section ``adapt``).
        micro_batch: largest number of pictures that one rank runs at once.
    """
    settings = _settings(align, adapt, dtype, clip=align.clip, schedule="constant", micro_batch=micro_batch)
    task = Task(model, family, adapt, cache, scheduler)
    place = Place(
        folder,
        console,
        seed,
        saving,
        held_out,
        "align head",
        {"stage": "align_head", **task.identity(settings), "seed": seed},
    )
    return _train(task, settings, task.modules, place)


def adapt_phase(
    model: nn.Module,
    family: Family,
    phase: Any,
    adapt: Any,
    cache: Any,
    folder: Path,
    *,
    scheduler: dict[str, Any],
    dtype: str,
    console: Console = NULL,
    seed: int = 0,
    saving: Saving = MOMENT_SAVING,
    held_out: Any | None = None,
    intervals: Intervals = NONE,
) -> dict[str, Any]:
    """One phase of adaptation (arXiv 2509.25180, stage 3): LoRA + embedder + head, or every weight.

    Continues from its own checkpoints when ``folder`` has any. The model is left with the phase's adapter taken off
    and, with ZeRO below 3, with its trained embedder and head; the result of the phase is what was exported.

    Args:
        model: the converted diffusers transformer.
        phase: mode, steps, rank, alpha, lr, warmup, schedule, batch, micro_batch, targets (recipe: one of
            ``adapt.phases``).
        adapt: objective, null_branch, guidance_range, shift, text_drop, ema, clip, checkpointing, zero, offload
            (recipe: ``adapt``).
        cache: `LatentCache` of training rows: ``len``, ``spans`` and ``shapes``, ``batch(indices) -> (z0 (B, C, h, w)
            float32,
            text)``, ``null`` (text, batch of one).
        folder: takes ``checkpoints/``, ``metrics.jsonl`` and ``export/``.
        scheduler: the bundle's scheduler config; shift "model" trains with the shift that it samples with.
        dtype: "fp32" | "bf16".
        held_out: rows for the evaluation before, after and at intervals, as ``cache``; None skips it.
        intervals: when to evaluate and to draw on the way.
    Returns:
        what `loop.run` returns, and trained_parameters, adapted_linears, evaluation {"before", "after"}, exports
        (paths by kind).
    """
    settings = _settings(phase, adapt, dtype, clip=adapt.clip, schedule=phase.schedule, micro_batch=phase.micro_batch)
    if phase.consistency and family.prediction == "epsilon":
        raise RecipeError(
            f"a {family.name} model predicts epsilon, which says nothing of the picture in full noise: no "
            "consistency distillation",
            hint="set the phase's consistency to 0",
        )
    task = Task(model, family, adapt, cache, scheduler, phase.consistency)
    identity = {"stage": "adapt", "phase": _curve(phase), **task.identity(settings), "seed": seed}
    if phase.mode == "full":
        if adapt.objective == "guidance-corrected" and adapt.null_branch == "teacher":
            raise RecipeError(
                "full tuning changes every weight, so the frozen teacher would need a second model",
                hint="set adapt.null_branch to student, or the phase's mode to lora",
            )
        place = Place(folder, console, seed, saving, held_out, "adapt (full)", identity, intervals)
        return _train(task, settings, None, place)
    paths = lora.add_lora(model, phase.targets or family.lora_targets, phase.rank, phase.alpha, seed)
    try:
        place = Place(folder, console, seed, saving, held_out, f"adapt (LoRA {phase.rank})", identity, intervals)
        metrics = _train(task, settings, task.modules, place)
    finally:
        if settings.zero < 3:
            lora.remove_lora(model)
    return {**metrics, "adapted_linears": len(paths)}


@dataclass(frozen=True)
class Place:
    """Where a run writes and speaks, and what identifies it."""

    folder: Path
    console: Console
    seed: int
    saving: Saving
    held_out: Any | None
    label: str
    identity: dict[str, Any]
    intervals: Intervals = NONE


class Task:
    """What is learned: model, family, objective and the distribution of t, noise and guidance."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        adapt: Any,
        cache: Any,
        scheduler: dict[str, Any],
        consistency: float = 0.0,
    ):
        self.consistency = consistency
        self.model, self.family, self.adapt, self.cache = model, family, adapt, cache
        self.modules = [family.embedder, family.head]
        self.scheduler = scheduler

    def sampling(self, shape: Sequence[int]) -> Sampling:
        """How t, guidance and dropped captions are drawn for latents of ``shape`` (C, h, w)."""
        return sampling_of(self.family, self.adapt, shape, self.model.config, self.scheduler)

    def loss(self) -> Callable[[Tensor, Text, Draws], Tensor]:
        """(z0, text, draws) -> scalar. Call before the engine is made: the frozen teacher is the model as it is now."""
        family, model, null = self.family, self.model, self.cache.null
        if self.consistency:
            before, ratio = lora.frozen_teacher(model, self.modules), self.consistency

            def teacher(*at) -> Tensor:
                with before():
                    return velocity(family, model, *at)

            return lambda z0, text, draws: consistency_loss(family, model, z0, text, draws, null, teacher, ratio)
        if self.adapt.objective == "flow":
            weighting = self.adapt.weighting
            return lambda z0, text, draws: flow_loss(family, model, z0, text, draws, null, weighting)
        shown = self.adapt.data_guidance
        branch = lora.frozen_teacher(model, self.modules) if self.adapt.null_branch == "teacher" else nullcontext
        return lambda z0, text, draws: guidance_corrected_loss(family, model, z0, text, draws, null, branch, shown)

    def identity(self, settings: EngineSettings) -> dict[str, Any]:
        """Everything that decides the loss curve.

        The layout (ZeRO stage, micro-batch, offload, checkpointing) does not.
        """
        adapt = {key: value for key, value in _curve(self.adapt).items() if key != "phases"}
        engine = {key: value for key, value in vars(settings).items() if key not in LAYOUT}
        shifts = [self.sampling(shape).shift for shape in self.cache.shapes]
        shift = (
            {"shift": shifts[0]}
            if len(shifts) == 1
            else {"shifts": shifts, "spans": [len(span) for span in self.cache.spans]}
        )
        return {"adapt": adapt, "engine": engine, "rows": len(self.cache), **shift}


def sampling_of(family: Family, adapt: Any, shape: Sequence[int], config: Any, scheduler: dict[str, Any]) -> Sampling:
    """How t, guidance and dropped captions are drawn for latents of ``shape`` (C, h, w)."""
    common = dict(guidance_range=tuple(adapt.guidance_range), text_drop=adapt.text_drop)
    if family.prediction == "epsilon":
        return Sampling("ddpm", 1.0, **common, times=family.noise_times())
    if family.fixed_shift and adapt.shift != "model":
        raise RecipeError(
            f"the time input of a {family.name} network leans on its scheduler's shift, {adapt.shift!r} would break it",
            hint="set adapt.shift to model",
        )
    if adapt.shift == "model":
        patch = family.patch(config, shape[0])
        shift = family.shift(shape[1] * shape[2] // patch**2, scheduler)
    else:
        shift = flux2_shift(shape) if adapt.shift == "flux2" else float(adapt.shift)
    return Sampling("logit-normal", shift, **common)


def _settings(
    part: Any, adapt: Any, dtype: str, *, clip: float, schedule: str, micro_batch: int | None
) -> EngineSettings:
    return EngineSettings(
        steps=part.steps,
        lr=part.lr,
        warmup=part.warmup,
        schedule=schedule,
        batch=part.batch,
        micro_batch=micro_batch or part.batch,
        dtype=dtype,
        zero=2 if adapt.zero == "auto" else adapt.zero,
        offload=adapt.offload,
        clip=clip,
        ema=adapt.ema,
        checkpointing=adapt.checkpointing,
    )


def _train(task: Task, settings: EngineSettings, modules: list[str] | None, place: Place) -> dict[str, Any]:
    """Train ``modules`` and the LoRA on the model, or everything when ``modules`` is None; export the result."""
    model, loss_of, folder = task.model, task.loss(), place.folder
    named = lora.trainable(model, modules or [], everything=modules is None)
    metadata = lora.adapter_metadata(model, task.family.component) if getattr(model, "peft_config", None) else None
    engine = Engine(model, named, settings)
    try:
        before = _evaluate_once(engine, task, loss_of, place)
        metrics = loop.run(
            engine,
            task.cache,
            loss_of,
            task.sampling,
            folder,
            label=place.label,
            identity=place.identity,
            saving=place.saving,
            console=place.console,
            seed=place.seed,
            watch=_watch(engine, task, loss_of, place, modules is None),
        )
        with engine.averaged() if settings.ema else nullcontext():
            after = _evaluate(engine, task, loss_of, place)
        weights = engine.export()
        exports = (
            lora.save_export(weights, folder / "export", metadata, task.family.component) if engine.rank == 0 else {}
        )
    finally:
        engine.close()
    if settings.zero < 3:
        _keep(model, weights)
    return {
        **metrics,
        "trained_parameters": sum(tensor.numel() for tensor in weights.values()),
        "evaluation": {"before": before, "after": after},
        "exports": {kind: str(path) for kind, path in exports.items()},
    }


def _evaluate(engine: Engine, task: Task, loss_of: Callable, place: Place) -> dict[str, float] | None:
    """Held-out loss at fixed noise levels, or None without held-out rows."""
    rows = place.held_out
    if rows is None or not len(rows):
        return None
    batches = ((part, *rows.batch(list(part))) for part in buckets.batches(rows.spans, engine.micro_batch))

    def through_engine(*batch):
        return engine.evaluate(lambda parts: loss_of(*parts), batch)

    return evaluate_loss(through_engine, list(batches), place.seed, task.sampling, engine.device)


def _watch(engine: Engine, task: Task, loss_of: Callable, place: Place, full: bool) -> Watch:
    """What is looked at on the way, always with the averaged weights."""
    family, model, (_, words) = task.family, task.model, task.cache.batch([0])

    def averaged():
        return engine.averaged() if engine.settings.ema else nullcontext()

    def evaluate() -> dict[str, float] | None:
        with averaged():
            return _evaluate(engine, task, loss_of, place)

    def draw(step: int) -> None:
        with averaged():
            place.intervals.draw(lambda *at: engine.evaluate(lambda _: velocity(family, model, *at), None), step)

    meters = [meter_of(family, model, shape, words, task.adapt, full, task.consistency) for shape in task.cache.shapes]
    return Watch(place.folder, place.intervals, meters, evaluate, draw)


def _evaluate_once(engine: Engine, task: Task, loss_of: Callable, place: Place) -> dict[str, float] | None:
    """`_evaluate` before the first step; a resumed run finds it on disk."""
    path = place.folder / "evaluation-before.json"
    if distributed.agree(path.exists(), engine.device):  # by all or by none: ranks look at different moments
        return read_json(path)
    result = _evaluate(engine, task, loss_of, place)
    if result is not None and engine.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    return result


def _keep(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the model the exported weights, so that what is in memory is what was written."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].data.copy_(value)


def _curve(section: Any) -> dict[str, Any]:
    """A recipe section (pydantic or a namespace) as a dict of JSON values, without what only decides the layout."""
    values = section.model_dump(mode="json") if hasattr(section, "model_dump") else vars(section)
    return {key: value for key, value in values.items() if key not in LAYOUT}
