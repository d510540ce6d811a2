"""The two kinds of training: of the head (embedder + head, blocks frozen), and phases of adaptation (LoRA or full).

Both are one procedure: choose what trains, choose the objective, run the loop, export the averaged weights. They are
stages 2 and 3 of arXiv 2509.25180.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor, nn

from dcgen_convert.bundle.scheduler import flux2_shift
from dcgen_convert.core import clock
from dcgen_convert.core.errors import RecipeError
from dcgen_convert.core.files import atomic_save, read_object, sha256, write_json
from dcgen_convert.core.names import BEFORE, CHECKPOINTS, EXPORT, LORA_START
from dcgen_convert.data import buckets
from dcgen_convert.families import Family, Text
from dcgen_convert.families.base import Network
from dcgen_convert.planning.start import BATCHES
from dcgen_convert.recipe.schema import layout_names
from dcgen_convert.train import distributed, gradient_start, lora
from dcgen_convert.train.engine import Engine
from dcgen_convert.train.loop import Goal, Loop, Place, Samples
from dcgen_convert.train.meter import meter_of
from dcgen_convert.train.objective import (
    Draws,
    Figures,
    LossOf,
    Resident,
    Sampling,
    consistency_loss,
    evaluate_loss,
    flow_loss,
    guidance_corrected_loss,
    nothing_loss,
    velocity,
)
from dcgen_convert.train.settings import EngineSettings
from dcgen_convert.train.watch import TrainingWatch

if TYPE_CHECKING:
    from dcgen_convert.recipe.schema import Adapt, AlignHead, Phase
    from dcgen_convert.recipe.section import Section

LAYOUT = layout_names("adapt")  # settings that do not change the loss curve


@dataclass(frozen=True)
class Task:
    """What is learned: model, family, objective, rows, and the distribution of t, noise and guidance.

    Attributes:
        model: the converted diffusers transformer.
        adapt: what all training shares: objective, ema, ZeRO stage, ... (recipe section ``adapt``).
        rows: the training rows.
        scheduler: the bundle's scheduler config; shift "model" trains with the shift that it samples with.
        consistency: of the phase: ratio of consistency distillation; 0 disables.
        within: noise levels that the model draws at.
    """

    model: Network
    family: Family
    adapt: Adapt
    rows: Samples
    scheduler: dict[str, Any]
    consistency: float = 0.0
    within: tuple[float, float] = (0.0, 1.0)

    @property
    def modules(self) -> list[str]:
        """What trains whole beside the LoRA: embedder and head, by path."""
        return [self.family.embedder, self.family.head]

    def sampling(self, shape: Sequence[int]) -> Sampling:
        """How t, guidance and dropped captions are drawn for latents of ``shape`` (C, h, w)."""
        return sampling_of(self.family, self.adapt, shape, self.model.config, self.scheduler, self.within)

    def loss(self) -> LossOf:
        """(z0, text, draws) -> scalar. Call before the engine is made: the frozen teacher is the model as it is now."""
        family, model, null = self.family, self.model, Resident(self.rows.null)
        if self.consistency:
            return self._consistency_loss()
        if self.adapt.objective == "flow":
            weighting = self.adapt.weighting
            return lambda z0, text, draws: flow_loss(family, model, z0, text, draws, null.on(z0.device), weighting)
        shown = self.adapt.data_guidance
        branch: Callable[[], AbstractContextManager[None]] = nullcontext
        if self.adapt.null_branch == "teacher":
            branch = lora.frozen_teacher(model, self.modules)
        return lambda z0, text, draws: guidance_corrected_loss(
            family, model, z0, text, draws, null.on(z0.device), branch, shown
        )

    def _consistency_loss(self) -> LossOf:
        family, model, null, ratio = self.family, self.model, Resident(self.rows.null), self.consistency
        before = lora.frozen_teacher(model, self.modules)

        def teacher(z: Tensor, t: Tensor, text: Text, guidance: Tensor) -> Tensor:
            with before():
                return velocity(family, model, z, t, text, guidance)

        def loss(z0: Tensor, text: Text, draws: Draws) -> Tensor:
            return consistency_loss(family, model, z0, text, draws, null.on(z0.device), teacher, ratio)

        return loss

    def nothing(self) -> LossOf | None:
        """The loss of a model that always answers zero; None where the loss compares a model with itself."""
        if self.consistency:
            return None
        plain = self.adapt.objective == "flow"
        return partial(nothing_loss, self.family, weighting=self.adapt.weighting if plain else "none")

    def identity(self, settings: EngineSettings) -> dict[str, Any]:
        """Everything that decides the loss curve.

        The layout (ZeRO stage, micro-batch, offload, checkpointing) does not.
        """
        other = ("phases", "lora_start", "optimizer")  # what a phase begins from is named by its file
        adapt = {key: value for key, value in _curve(self.adapt).items() if key not in other}
        engine = {key: value for key, value in vars(settings).items() if key not in LAYOUT}
        if settings.optimizer == "adamw":
            del engine["optimizer"]  # checkpoints from before there was another one do not name it
        shifts = [self.sampling(shape).shift for shape in self.rows.shapes]
        spans = [len(span) for span in self.rows.spans]
        shift = {"shift": shifts[0]} if len(shifts) == 1 else {"shifts": shifts, "spans": spans}
        within = {} if self.within == (0.0, 1.0) else {"within": [*self.within]}
        return {"adapt": adapt, "engine": engine, "rows": len(self.rows), **shift, **within}


def train_head(task: Task, align: AlignHead, dtype: str, micro_batch: int, place: Place) -> dict[str, Any]:
    """Train embedder and head with the blocks frozen (arXiv 2509.25180, stage 2). The result is as of `adapt_phase`.

    Args:
        align: steps, lr, batch, warmup, clip of the stage (recipe section ``align_head``).
        dtype: "fp32" | "bf16".
        micro_batch: largest number of pictures that one rank runs at once.
    """
    settings = _settings(align, task.adapt, dtype, clip=align.clip, schedule="constant", micro_batch=micro_batch)
    identity = {"stage": "align_head", **task.identity(settings), "seed": place.seed}
    return _train(task, settings, task.modules, place, "align head", identity)


def find_start(task: Task, phase: Phase, rank: int, dtype: str, place: Place) -> None:
    """Write where the LoRA of the first phase begins: a file of `lora.Start`, for `adapt_phase`. Collective.

    With ZeRO 3 the model's weights stay partitioned.

    Args:
        phase: as `planning.start.start_phase` makes it.
        rank: of the LoRA that is to come.
    """
    task = replace(task, consistency=phase.consistency)
    settings = _settings(phase, task.adapt, dtype, clip=0.0, schedule="constant", micro_batch=phase.micro_batch)
    settings = replace(settings, lr=0.0, warmup=0, ema=0.0)  # as many steps as are asked for: none of them moves
    paths = lora.targeted(task.model, phase.targets or task.family.lora_targets)
    goal = Goal("LoRA start", task.rows, task.loss(), task.sampling, {})
    engine = Engine(task.model, lora.trainable(task.model, task.modules), settings)
    try:
        found = gradient_start.measured(engine, goal, place, paths, rank)
        if engine.rank == 0:
            path = place.folder / CHECKPOINTS / LORA_START
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_save(found, path)
            place.console.say(
                f"LoRA begins along the gradient of {BATCHES} batches of {phase.batch} pictures, "
                f"in {len(found) // 2} of {len(paths)} linears"
            )
        distributed.agree(True, engine.device)  # every rank reads the file
    finally:
        engine.close()


def adapt_phase(task: Task, phase: Phase, dtype: str, place: Place, start: Path | None = None) -> dict[str, Any]:
    """One phase of adaptation (arXiv 2509.25180, stage 3): LoRA + embedder + head, or every weight.

    Continues from its own checkpoints when ``place.folder`` has any. At the end the phase's adapter is taken off the
    model. With ZeRO below 3 the model keeps the trained embedder and head. The result of the phase is what was
    exported.

    Args:
        phase: mode, steps, rank, alpha, lr, warmup, schedule, batch, micro_batch, targets, consistency (recipe: one of
            ``adapt.phases``).
        dtype: "fp32" | "bf16".
        start: the file of `find_start`; None: LoRA begins at zero.
    Returns:
        what `Loop.run` returns, and trained_parameters, adapted_linears, evaluation {"before", "after"}, exports
        (paths by kind).
    Raises:
        RecipeError: the phase's settings contradict one another, or the family.
    """
    model, family, adapt = task.model, task.family, task.adapt
    task = replace(task, consistency=phase.consistency)
    settings = _settings(phase, adapt, dtype, clip=adapt.clip, schedule=phase.schedule, micro_batch=phase.micro_batch)
    settings = replace(settings, optimizer=adapt.optimizer)
    _require_teacher(task, phase)
    identity = {"stage": "adapt", "phase": _curve(phase), **task.identity(settings), "seed": place.seed}
    if phase.mode == "full":
        return _train(task, settings, None, place, "adapt (full)", identity)
    begin = load_file(start) if start else None
    if start:
        identity["start"] = sha256(start)
    paths = lora.add_lora(
        model, phase.targets or family.lora_targets, phase.rank, phase.alpha or phase.rank, place.seed, begin
    )
    try:
        metrics = _train(task, settings, task.modules, place, f"adapt (LoRA {phase.rank})", identity, begin)
    finally:
        if settings.zero < 3:
            lora.remove_lora(model)
    return {**metrics, "adapted_linears": len(paths)}


def _require_teacher(task: Task, phase: Phase) -> None:
    """RecipeError for a phase whose teacher cannot be had."""
    if phase.consistency and task.family.prediction == "epsilon":
        raise RecipeError(
            f"a {task.family.name} model predicts epsilon, which says nothing of the picture in full noise: no "
            "consistency distillation",
            hint="set the phase's consistency to 0",
        )
    teaches = task.adapt.objective == "guidance-corrected" and task.adapt.null_branch == "teacher"
    if phase.mode == "full" and teaches:
        raise RecipeError(
            "full tuning changes every weight, so the frozen teacher would need a second model",
            hint="set adapt.null_branch to student, or the phase's mode to lora",
        )


def sampling_of(
    family: Family,
    adapt: Adapt,
    shape: Sequence[int],
    config: dict[str, Any],
    scheduler: dict[str, Any],
    within: tuple[float, float] = (0.0, 1.0),
) -> Sampling:
    """How t, guidance and dropped captions are drawn for latents of ``shape`` (C, h, w).

    Args:
        config: of the converted transformer.
        scheduler: config of the bundle's scheduler.
        within: noise levels that the network draws at.
    """
    guidance, drop = adapt.guidance_range, adapt.text_drop
    if family.prediction == "epsilon":
        return Sampling("ddpm", 1.0, guidance, drop, times=family.noise_times())
    if family.fixed_shift and adapt.shift != "model":
        raise RecipeError(
            f"the time input of a {family.name} network leans on its scheduler's shift, {adapt.shift!r} would break it",
            hint="set adapt.shift to model",
        )
    channels, *sides = shape
    if adapt.shift == "model":
        shift = family.shift(math.prod(family.grid(sides, family.patch(config, channels))), scheduler)
    else:
        shift = flux2_shift(channels, math.prod(sides)) if adapt.shift == "flux2" else float(adapt.shift)
    return Sampling("logit-normal", shift, guidance, drop, within=within)


def _settings(
    part: Phase | AlignHead, adapt: Adapt, dtype: str, *, clip: float, schedule: str, micro_batch: int | None
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


def _train(
    task: Task,
    settings: EngineSettings,
    modules: list[str] | None,
    place: Place,
    label: str,
    identity: dict[str, Any],
    start: lora.Start | None = None,
) -> dict[str, Any]:
    """Train ``modules`` and the LoRA on the model, or everything when ``modules`` is None; export the result.

    ``start``: where the LoRA begins, if not at zero.
    """
    model, component = task.model, task.family.component
    goal = Goal(label, task.rows, task.loss(), task.sampling, identity, task.nothing())
    named = lora.trainable(model, modules or [], everything=modules is None)
    metadata = lora.adapter_metadata(model, component) if getattr(model, "peft_config", None) else None
    engine = Engine(model, named, settings, _matrices(task.family, named))
    try:
        before = _evaluate_once(engine, goal, place)
        metrics = Loop(engine, goal, place, _watch(engine, task, goal, place, modules is None)).run()
        with _averaged(engine):
            after = _evaluate(engine, goal, place)
        weights, exports = engine.export(), {}
        if engine.rank == 0:
            exports = lora.save_export(lora.joined(weights, start), place.folder / EXPORT, metadata, component)
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


def _matrices(family: Family, named: Sequence[tuple[str, nn.Parameter]]) -> set[str]:
    """Names of the weights of the blocks' linears and convolutions, or of their LoRA."""
    inside = family.inside_blocks
    return {name for name, p in named if p.ndim > 1 and name.endswith(".weight") and inside.match(name)}


def _averaged(engine: Engine) -> AbstractContextManager[None]:
    """The engine's weights as they are exported: the moving average if there is one."""
    return engine.averaged() if engine.settings.ema else nullcontext()


def _evaluate(engine: Engine, goal: Goal, place: Place, loss_of: LossOf | None = None) -> dict[str, float] | None:
    """Held-out loss at fixed noise levels, or None without held-out rows. Every rank takes its part of the rows.

    ``loss_of``: another loss than the goal's, of no network.
    """
    rows = place.held_out
    if rows is None or not len(rows):
        return None
    parts, world = buckets.batches(rows.spans, engine.micro_batch), engine.world
    own = parts[engine.rank :: world]
    if len(own) * world < len(parts):  # as many passes as the others: with ZeRO 3 they gather the weights together
        own.append(parts[0])
    batches = [(part, *rows.batch(list(part))) for part in own]

    def combine(figures: Figures) -> Figures:
        everyone = distributed.of_all(figures, engine.device)
        return [everyone[number % world][number // world] for number in range(len(parts))]

    def through_engine(z0: Tensor, text: Text, draws: Draws) -> Tensor:
        return engine.evaluate(lambda parts: goal.loss_of(*parts), (z0, text, draws))

    with clock.timed("evaluate", sum(map(len, own))):
        found = loss_of or through_engine
        return evaluate_loss(found, batches, place.seed, goal.sampling, engine.device, combine)


def _evaluate_once(engine: Engine, goal: Goal, place: Place) -> dict[str, float] | None:
    """`_evaluate` before the first step, and "nothing": the mean loss of a model that always answers zero.

    A resumed run finds the result on disk.
    """
    path = place.folder / BEFORE
    if distributed.agree(path.exists(), engine.device):  # all ranks or none: they look at different moments
        return read_object(path)
    result = _evaluate(engine, goal, place)
    nothing = _evaluate(engine, goal, place, goal.nothing) if goal.nothing else None
    if result and nothing:
        result["nothing"] = nothing["mean"]
    if result is not None and engine.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    return result


def _watch(engine: Engine, task: Task, goal: Goal, place: Place, full: bool) -> TrainingWatch:
    """What is looked at on the way, always with the averaged weights."""
    family, model, rows = task.family, task.model, task.rows
    firsts = [rows.batch([span.start])[1] for span in (rows.spans if family.references else rows.spans[:1])]

    def evaluate() -> dict[str, float] | None:
        with _averaged(engine):
            return _evaluate(engine, goal, place)

    def through_engine(z: Tensor, t: Tensor, text: Text, guidance: Tensor) -> Tensor:
        return engine.evaluate(lambda _: velocity(family, model, z, t, text, guidance), None)

    def draw(step: int) -> None:
        if place.intervals.draw:
            with _averaged(engine):
                place.intervals.draw(through_engine, step)

    texts = firsts if family.references else firsts * len(rows.shapes)
    sizes = zip(rows.shapes, texts, strict=True)
    meters = [meter_of(family, model, shape, text, task.adapt, full, task.consistency) for shape, text in sizes]
    return TrainingWatch(place.folder, place.intervals, meters, evaluate, draw)


def _keep(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the model the exported weights, so that what is in memory is what was written."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].data.copy_(value)


def _curve(section: Section) -> dict[str, Any]:
    """A recipe section as JSON values, without the settings that only decide the layout.

    The data of a phase stands in the rows that it trains on.
    """
    return {key: value for key, value in section.model_dump(mode="json").items() if key not in (*LAYOUT, "data")}
