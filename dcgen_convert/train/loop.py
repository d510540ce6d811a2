"""The training loop that every stage shares: batches in, steps, watching, checkpoints, a clean stop.

Every step is shown on the console's progress bar, sent to its tracker, and written as one JSON line to metrics.jsonl. A
NaN or a spike stops the run; the last good checkpoint is kept. After SIGINT or SIGTERM the loop finishes its step,
writes a checkpoint, and raises. The micro-batches of the next step are read while the device works on the present one.
"""

from __future__ import annotations

import json
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dcgen_convert.core import clock
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import CheckFailed, InputError, Terminated
from dcgen_convert.core.files import read_lines
from dcgen_convert.core.names import CHECKPOINTS, METRICS
from dcgen_convert.core.progress import Bar
from dcgen_convert.families import Text
from dcgen_convert.train import distributed
from dcgen_convert.train.checkpoints import damaged, latest, load, save, whole
from dcgen_convert.train.engine import Engine, StepRecord
from dcgen_convert.train.objective import Draws, LossOf, SamplingOf, draw, to_device
from dcgen_convert.train.order import BatchOrder
from dcgen_convert.train.prefetch import Prefetch
from dcgen_convert.train.settings import Turn
from dcgen_convert.train.watch import NONE, Intervals, TrainingWatch, kept_lines

SPIKE = 10.0  # a loss this many times the recent median stops the run
WINDOW = 50  # steps that the median looks back on
WARM = 20  # steps before it is trusted
# What may change while a run goes on: a longer phase, a lower rate or clip after a spike, new pictures.
CHANGEABLE = (
    "engine.steps", "engine.lr", "engine.clip", "phase.steps", "phase.lr", "adapt.clip", "rows", "spans",
)  # fmt: skip


class Samples(Protocol):
    """What training needs of a latent cache. Rows of one span have one shape, and a batch is read from one span.

    Attributes:
        spans: rows of one shape each, one span after the other.
        shapes: (C, h, w) of the latents of each span.
        null: the condition of the empty prompt, a batch of one.
    """

    @property
    def spans(self) -> Sequence[range]: ...

    @property
    def shapes(self) -> Sequence[Sequence[int]]: ...

    @property
    def null(self) -> Text: ...

    def __len__(self) -> int: ...

    def batch(self, indices: list[int] | Tensor) -> tuple[Tensor, Text]: ...


@dataclass(frozen=True)
class Saving:
    """When to write a checkpoint: every ``steps`` and every ``minutes``, whichever comes first; 0 disables each."""

    steps: int
    minutes: float


@dataclass(frozen=True)
class Place:
    """Where a run writes and what it tells on the way.

    Attributes:
        folder: takes ``checkpoints/``, ``metrics.jsonl``, ``evaluations.jsonl`` and ``export/``.
        console: shows the steps.
        seed: of the order of the rows and of every random draw.
        saving: when to write a checkpoint.
        held_out: rows for the evaluation before, after and at intervals; None: no evaluation.
        intervals: when to evaluate and to draw on the way.
        deadline: `time.monotonic()` of this process after which the training ends early; None: it does not.
    """

    folder: Path
    console: Console = NULL
    seed: int = 0
    saving: Saving = Saving(steps=0, minutes=10)  # a kill costs ten minutes at most
    held_out: Samples | None = None
    intervals: Intervals = NONE
    deadline: float | None = None


@dataclass(frozen=True)
class Goal:
    """What a run minimises, over which rows.

    Attributes:
        label: what the console and the tracker call the run.
        samples: the training rows.
        loss_of: (z0, text, draws) -> mean loss over the samples.
        sampling: shape (C, h, w) of a batch -> how its draws are distributed.
        identity: what must be equal for a checkpoint to be continued (objective, data, phase).
        nothing: as loss_of, of a model that always answers zero; None: there is no such loss.
    """

    label: str
    samples: Samples
    loss_of: LossOf
    sampling: SamplingOf
    identity: dict[str, Any]
    nothing: LossOf | None = None


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from.

    step: of the checkpoint. history: what was changed on the way, in words. ended: time had run out, so it is the last.
    """

    step: int
    history: list[str]
    ended: bool


@dataclass
class Curve:
    """Losses of the run, with the guard against spikes.

    losses: of every step, on rank 0; the other ranks know those since the last start. recent: since the last start.
    """

    losses: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, loss: float) -> float | None:
        """Note a loss. When the loss is a spike, return the recent median, else None."""
        median = statistics.median(self.recent) if len(self.recent) >= WARM else None
        if median is not None and loss > SPIKE * median:
            return median
        self.losses.append(loss)
        self.recent.append(loss)
        return None


class Loop:
    """One training run.

    Args:
        watch: figures, evaluations and grids on the way; None: none.
    """

    def __init__(self, engine: Engine, goal: Goal, place: Place, watch: TrainingWatch | None = None) -> None:
        self.engine, self.goal, self.place = engine, goal, place
        self.console = place.console if engine.rank == 0 else NULL
        self.watch = watch or TrainingWatch(place.folder, NONE)
        self.checkpoints = place.folder / CHECKPOINTS
        self.order = BatchOrder(goal.samples.spans, engine.settings.batch, place.seed)
        self.curve = Curve()
        self.history: list[str] = []
        self.ended = False
        self._metrics: _Metrics | None = None
        self._saved = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Train to ``engine.settings.steps``, from the newest checkpoint if there is one. Collective.

        It ends earlier when the deadline of its place has passed. The last checkpoint then says so: a run that is
        resumed from it does not train on. A cosine is shortened on the way, so that it ends at the deadline.

        Returns:
            steps, ended (only when it ended early: its "step", the steps that it was to have, the last learning rate),
            seconds, samples_per_second, data_wait_seconds, loss_first and loss_last (means of the first / last
            20 steps; on rank 0 of the whole run, also when it was cut off), resumed_from.
        Raises:
            CheckFailed: NaN or a loss spike; the message names the step, the hint the checkpoint that was kept.
            InputError: there are no samples, or the checkpoint belongs to other settings.
            KeyboardInterrupt, Terminated: a signal came; a checkpoint was written first.
        """
        engine, label = self.engine, self.goal.label
        if len(self.goal.samples) == 0:
            raise InputError(f"{label}: there are no samples to train on")
        resumed = _resume(engine, self.checkpoints, self.goal.identity, self.console)
        self.history, self.ended = (resumed.history, resumed.ended) if resumed else ([], False)
        first, start = engine.step_count, time.monotonic()
        self._saved = start
        feed = _feed(engine, self.goal.samples, self.goal.sampling, self.place.seed)
        left = engine.settings.steps - first
        with closing(feed), _signals() as signals, self.console.progress(label, left, "step") as bar:
            if engine.rank == 0:  # whoever sees this file may send a signal
                self._metrics = _Metrics(self.place.folder / METRICS, first)
                self.curve.losses = self._metrics.losses_before()
                self.watch.forget(first)
                self.watch.look()
            if resumed and self._any_rank(self.watch.missed(first)):
                self.watch.after_save(first)
            while not self.ended and engine.step_count < engine.settings.last:
                waited = feed.waited
                record = self._step(feed, signals.pending)
                self._report(record, feed.waited - waited, bar)
                self.ended = self._time_is_up()
                if self._must_save(record):
                    self._aim((time.monotonic() - start) / (engine.step_count - first))
                    self._save()
                if record.stop:
                    self._tell_of_stop()
                    raise signals.exception()
                self._look(record)
        seconds = time.monotonic() - start
        if self._metrics:
            self._metrics.flush()
        done = engine.step_count - first
        return {
            "steps": engine.step_count,
            **self._early(),
            "resumed_from": resumed.step if resumed else None,
            "seconds": round(seconds, 3),
            "samples_per_second": round(done * engine.settings.batch / seconds, 3) if done else None,
            "data_wait_seconds": round(feed.waited, 3),
            "loss_first": _mean(self.curve.losses[:20]),
            "loss_last": _mean(self.curve.losses[-20:]),
            **({"history": self.history} if self.history else {}),
        }

    def _step(self, feed: Prefetch, stop: bool) -> StepRecord:
        """One step of the engine; CheckFailed with the step, the rows and the kept checkpoint when it went wrong."""
        engine, step = self.engine, self.engine.step_count

        def micro_loss(positions: Sequence[int]) -> Tensor:
            return self.goal.loss_of(*to_device(feed.take((step, positions)), engine.device))

        try:
            with clock.timed("train", engine.micro_batch * engine.accumulation):
                record = engine.step(micro_loss, positions_of(engine), stop)
            median = self.curve.add(record.loss)
            if median is not None:
                raise CheckFailed(f"the loss of step {step} jumped to {record.loss:.4g} from a median of {median:.4g}")
        except CheckFailed as error:
            kept = whole(self.checkpoints)
            cure = "lower lr or clip"
            raise CheckFailed(
                f"{error.message} (rows {_short(self.order.rows_of(step))})",
                hint=f"the last good checkpoint is {kept[-1]}; {cure}, or look at those rows" if kept else cure,
            ) from error
        return record

    def _report(self, record: StepRecord, waited: float, bar: Bar) -> None:
        """Show the figures of a step, and write them down."""
        batch, watch = self.engine.settings.batch, self.watch
        rate = batch / record.seconds
        meter = watch.meters[self.order.span_of(record.step)] if watch.meters else None
        read = meter.read(batch, record.seconds, self.engine.world) if meter else {}
        shown = {"loss": record.loss, "grad_norm": record.grad_norm, "lr": record.lr, "samples_per_s": rate, **read}
        if self._metrics:
            self._metrics.add(record, rate, {**read, "data_wait_seconds": waited})
        bar.advance(1, **shown)
        self.console.scalars(self.goal.label, record.step, shown)

    def _must_save(self, record: StepRecord) -> bool:
        """Whether a checkpoint follows this step; the same answer on every rank."""
        saving, step = self.place.saving, self.engine.step_count
        late = bool(saving.minutes) and self._any_rank(time.monotonic() - self._saved > 60 * saving.minutes)
        due = bool(saving.steps) and step % saving.steps == 0
        last = self.ended or step == self.engine.settings.last
        return record.stop or late or due or self.watch.wants_grid(step) or last

    def _time_is_up(self) -> bool:
        """Whether the deadline has passed on any rank."""
        deadline = self.place.deadline
        return deadline is not None and self._any_rank(time.monotonic() > deadline)

    def _aim(self, seconds: float) -> None:
        """Let a cosine end at the step that the deadline will stop it at, as far as one step takes ``seconds``."""
        engine, deadline = self.engine, self.place.deadline
        settings, step = engine.settings, engine.step_count
        if deadline is None or self.ended or settings.schedule != "cosine":
            return
        if not settings.warmup < step < settings.last:
            return
        more = max(1, int((deadline - time.monotonic()) / seconds))
        end = distributed.of_rank_0(min(step + more, settings.steps), engine.device)
        if end != settings.last:
            engine.settings = settings.turned(step, end)

    def _early(self) -> dict[str, Any]:
        """What is to be said of a training that ended before its last step."""
        step, settings = self.engine.step_count, self.engine.settings
        if step >= settings.steps:
            return {}
        rate = settings.learning_rate(step - 1)
        self.console.warn(
            f"{self.goal.label}: its part of the budget is spent, so it ended after step {step} of {settings.steps}, "
            f"at learning rate {rate:.3g}"
        )
        return {"ended": {"step": step, "of": settings.steps, "learning_rate": rate}}

    def _save(self) -> None:
        if self._metrics:
            self._metrics.flush()
        early = {"ended": True} if self.ended else {}
        turn = {"turn": self.engine.settings.turn} if self.engine.settings.turn else {}
        extra = {"identity": self.goal.identity, "history": self.history, **early, **turn}
        with clock.timed("checkpoints"):
            save(self.engine, self.checkpoints, extra)
        self._saved = time.monotonic()

    def _tell_of_stop(self) -> None:
        step, steps = self.engine.step_count, self.engine.settings.steps
        self.console.say(f"{self.goal.label}: stopped after step {step} of {steps}; a checkpoint is written")

    def _look(self, record: StepRecord) -> None:
        """Draw and evaluate where it is due."""
        label, step = self.goal.label, self.engine.step_count
        self.watch.after_save(step)
        losses = self.watch.after_step(step, self.engine.rank == 0)
        if losses:
            self.console.scalars(label, record.step, {f"held_out_{key}": value for key, value in losses.items()})
            self.console.say(f"{label}: held-out loss {losses['mean']:.4f} after step {step}")

    def _any_rank(self, condition: bool) -> bool:
        return not distributed.agree(not condition, self.engine.device)


def _feed(engine: Engine, samples: Samples, sampling: SamplingOf, seed: int) -> Prefetch:
    """This rank's micro-batches (z0, text, draws) from the present step on; key: (step, positions in the batch)."""
    order = BatchOrder(samples.spans, engine.settings.batch, seed)  # only the reading thread uses this one

    def read(key: tuple[int, range]) -> tuple[Tensor, Text, Draws]:
        step, positions = key
        rows = order.rows_of(step)
        z0, text = samples.batch([rows[position] for position in positions])
        return z0, text, draw(seed, step, positions, z0.shape[1:], sampling(z0.shape[1:]))

    steps = range(engine.step_count, engine.settings.steps)
    keys = ((step, positions) for step in steps for positions in positions_of(engine))
    return Prefetch(read, keys, engine.accumulation + 1, engine.device)


def _resume(engine: Engine, checkpoints: Path, identity: dict[str, Any], console: Console) -> Resumed | None:
    """Load the newest checkpoint; None when there is none. InputError when it is of another training."""
    found, cut = latest(checkpoints), damaged(checkpoints)
    if cut and not found:
        raise CheckFailed(f"{cut} is damaged, and there is no other", f"delete {checkpoints} to start this stage again")
    if cut:
        console.warn(f"{cut} is damaged: the checkpoint before it is used")
    history: list[str] = []
    ended = False
    if found is not None:
        extra = found[1]["extra"]
        changed = _changes(extra["identity"], json.loads(json.dumps(identity)))
        different = sorted(name for name in changed if name not in CHANGEABLE)
        if different:
            raise InputError(
                f"{found[0]} was written with other settings: {', '.join(different)}",
                hint=f"delete {checkpoints} to start this stage again, or use the settings of the run",
            )
        shown = [f"{name} {changed[name][0]} -> {changed[name][1]}" for name in CHANGEABLE if name in changed]
        history = extra.get("history", [])
        if shown:
            history = [*history, f"from step {found[1]['step']} on: {', '.join(shown)}"]
            console.say(f"{history[-1]}")
        if "engine.steps" not in changed:  # with other steps it is another schedule, and another end
            ended = bool(extra.get("ended"))
            turn = extra.get("turn")
            engine.settings = replace(engine.settings, turn=Turn(*turn) if turn else None)
    if load(engine, checkpoints) is None:
        return None
    console.say(f"continuing from the checkpoint of step {engine.step_count} in {checkpoints}")
    return Resumed(engine.step_count, history, ended)


def _changes(old: dict[str, Any], new: dict[str, Any], place: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old, new) value of what differs; each setting once."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found |= _changes(before, now, f"{place}{key}.")
        elif before != now:
            found[f"{place}{key}"] = before, now
    return found


def positions_of(engine: Engine) -> list[range]:
    """Positions in the global batch of each micro-batch of this rank."""
    start = engine.rank * engine.micro_batch * engine.accumulation
    return [
        range(start + i * engine.micro_batch, start + (i + 1) * engine.micro_batch) for i in range(engine.accumulation)
    ]


def _short(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (f", ... {len(rows)} in all" if len(rows) > 8 else "")


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


class _Metrics:
    """metrics.jsonl: one line per step. After a resume the lines of steps that will be repeated are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._lines: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        kept_lines(path, lambda line: line["step"] < step)

    def losses_before(self) -> list[float]:
        """Losses of the steps that were done before this start."""
        return [json.loads(line)["loss"] for line in read_lines(self.path)]

    def add(self, record: StepRecord, rate: float, more: dict[str, float]) -> None:
        line = {key: value for key, value in asdict(record).items() if key != "stop"}
        more = {key: float(f"{value:.5g}") for key, value in more.items()}
        self._lines.append(json.dumps({**line, "samples_per_second": round(rate, 3), **more}))
        if len(self._lines) >= 20:
            self.flush()

    def flush(self) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self._lines)
        self._lines = []


class _Signals:
    """Remembers a SIGINT or SIGTERM until the step is finished; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    @property
    def pending(self) -> bool:
        return self.received is not None

    def __call__(self, number: int, _frame: object) -> None:
        if self.pending:
            raise self.exception()
        self.received = number

    def exception(self) -> BaseException:
        """What to raise. A rank that received no signal itself (None) stops because another rank did."""
        return KeyboardInterrupt() if self.received == signal.SIGINT else Terminated()


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Hold back SIGINT and SIGTERM while a step runs: in the middle of one the weights are half updated."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals  # Python delivers signals to the main thread only
        return
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
