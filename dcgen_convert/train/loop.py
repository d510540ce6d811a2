"""The training loop that every stage shares: batches in, steps, watching, checkpoints, a clean stop.

One step line per step on the console's progress and to its tracker, one JSON line per step in metrics.jsonl. A NaN or a
spike stops the run and keeps the last good checkpoint; SIGINT and SIGTERM let the step finish, write a checkpoint, and
raise. The next step's micro-batches are read while the device works on this one.
"""

from __future__ import annotations

import json
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import CheckFailed, InputError, Terminated
from dcgen_convert.families import Text
from dcgen_convert.train import distributed
from dcgen_convert.train.checkpoints import latest, load, save, whole
from dcgen_convert.train.engine import Engine, StepRecord
from dcgen_convert.train.objective import Draws, SamplingOf, draw, to_device
from dcgen_convert.train.order import Order
from dcgen_convert.train.prefetch import Prefetch
from dcgen_convert.train.watch import NONE, Watch, kept_lines

SPIKE = 10.0  # a loss this many times the recent median stops the run
WINDOW = 50  # steps that the median looks back on
WARM = 20  # steps before it is trusted
METRICS = "metrics.jsonl"


class Samples(Protocol):
    """What the loop needs of a latent cache; rows of one span have one shape, and batches are of one span."""

    spans: Sequence[range]

    def __len__(self) -> int: ...

    def batch(self, indices: list[int] | Tensor) -> tuple[Tensor, Text]: ...


@dataclass(frozen=True)
class Saving:
    """When to write a checkpoint: every ``steps`` and every ``minutes``, whichever comes first; 0 disables each."""

    steps: int
    minutes: float


@dataclass
class Curve:
    """Losses seen by this process, with the guard against spikes."""

    losses: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, loss: float) -> float | None:
        """Note a loss; the recent median when the loss is a spike, else None."""
        median = statistics.median(self.recent) if len(self.recent) >= WARM else None
        if median is not None and loss > SPIKE * median:
            return median
        self.losses.append(loss)
        self.recent.append(loss)
        return None


def run(
    engine: Engine,
    samples: Samples,
    loss_of: Callable[[Tensor, Text, Draws], Tensor],
    sampling: SamplingOf,
    folder: Path,
    *,
    label: str,
    identity: dict[str, Any],
    saving: Saving,
    console: Console,
    seed: int,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train to ``engine.settings.steps``, from the newest checkpoint in ``folder`` if there is one.

    Args:
        loss_of: (z0, text, draws) -> mean loss over the samples.
        sampling: shape (C, h, w) of a batch -> how its draws are distributed.
        identity: what must be equal for a checkpoint to be continued (objective, data, phase).
        watch: figures, evaluations and grids on the way; None: none.
    Returns:
        steps, seconds, samples_per_second, data_wait_seconds, loss_first and loss_last (means of the first / last 20
        steps of this process), resumed_from.
    Raises:
        CheckFailed: NaN or a loss spike; the message names the step, the hint the checkpoint that was kept.
        InputError: the checkpoint belongs to other settings.
        KeyboardInterrupt, Terminated: a signal came; a checkpoint was written first.
    """
    checkpoints, settings = folder / "checkpoints", engine.settings
    if len(samples) == 0:
        raise InputError(f"{label}: there are no samples to train on")
    speaks = engine.rank == 0
    console = console if speaks else NULL
    watch = watch or Watch(folder, NONE)
    resumed = _resume(engine, checkpoints, identity, console)
    metrics = _Metrics(folder / METRICS, engine.step_count) if speaks else None
    if speaks:
        watch.forget(engine.step_count)
    curve = Curve()
    start = last_save = time.monotonic()
    first_step = engine.step_count
    order = Order(samples.spans, settings.batch, seed)
    feed = _feed(engine, samples, sampling, seed)
    with closing(feed), _signals() as signals, console.progress(label, settings.steps - first_step, "step") as bar:
        while engine.step_count < settings.steps:
            waited = feed.waited
            record = _guarded_step(engine, order, feed, loss_of, curve, signals.pending, checkpoints)
            rate = settings.batch / record.seconds
            meter = watch.meters[order.span_of(record.step)] if watch.meters else None
            read = meter.read(settings.batch, record.seconds, engine.world) if meter else {}
            shown = {"loss": record.loss, "grad_norm": record.grad_norm, "lr": record.lr, "samples_per_s": rate, **read}
            if metrics:
                metrics.add(record, rate, {**read, "data_wait_seconds": feed.waited - waited})
            bar.advance(1, **shown)
            console.scalars(label, record.step, shown)
            due = saving.minutes and _any_rank(time.monotonic() - last_save > 60 * saving.minutes, engine)
            if (
                record.stop
                or due
                or (saving.steps and engine.step_count % saving.steps == 0)
                or watch.wants_grid(engine.step_count)
                or engine.step_count == settings.steps
            ):
                if metrics:
                    metrics.flush()
                save(engine, checkpoints, {"identity": identity})
                last_save = time.monotonic()
            if record.stop:
                console.say(
                    f"{label}: stopped after step {engine.step_count} of {settings.steps}; a checkpoint is written"
                )
                raise signals.exception()
            watch.after_save(engine.step_count)
            losses = watch.after_step(engine.step_count, speaks)
            if losses:
                console.scalars(label, record.step, {f"held_out_{key}": value for key, value in losses.items()})
                console.say(f"{label}: held-out loss {losses['mean']:.4f} after step {engine.step_count}")
    done = engine.step_count - first_step
    seconds = time.monotonic() - start
    if metrics:
        metrics.flush()
    return {
        "steps": engine.step_count,
        "resumed_from": resumed,
        "seconds": round(seconds, 3),
        "samples_per_second": round(done * settings.batch / seconds, 3) if done else None,
        "data_wait_seconds": round(feed.waited, 3),
        "loss_first": _mean(curve.losses[:20]),
        "loss_last": _mean(curve.losses[-20:]),
    }


def _feed(engine: Engine, samples: Samples, sampling: SamplingOf, seed: int) -> Prefetch:
    """This rank's micro-batches (z0, text, draws) from the present step on, by (step, positions in the global
    batch).
    """
    order = Order(samples.spans, engine.settings.batch, seed)  # of the reading thread alone

    def read(key: tuple[int, range]) -> tuple[Tensor, Text, Draws]:
        step, positions = key
        rows = order.rows_of(step)
        z0, text = samples.batch([rows[position] for position in positions])
        return z0, text, draw(seed, step, positions, z0.shape[1:], sampling(z0.shape[1:]))

    steps = range(engine.step_count, engine.settings.steps)
    keys = ((step, positions) for step in steps for positions in positions_of(engine))
    return Prefetch(read, keys, engine.accumulation + 1, engine.device)


def _resume(engine: Engine, checkpoints: Path, identity: dict[str, Any], console: Console) -> int | None:
    found = latest(checkpoints)
    if found is not None:
        written = found[1]["extra"]["identity"]
        different = sorted(
            key for key in {**written, **identity} if written.get(key) != json.loads(json.dumps(identity.get(key)))
        )
        if different:
            raise InputError(
                f"{found[0]} was written with other settings: {', '.join(different)}",
                hint=f"delete {checkpoints} to start this stage again, or use the settings of the run",
            )
    if load(engine, checkpoints) is None:
        return None
    console.say(f"continuing from the checkpoint of step {engine.step_count} in {checkpoints}")
    return engine.step_count


def _guarded_step(engine, order, feed, loss_of, curve, stop, checkpoints) -> StepRecord:
    """One step of the engine; CheckFailed with the step, the batch and the kept checkpoint when it went wrong."""
    step = engine.step_count

    def micro_loss(positions: Sequence[int]) -> Tensor:
        return loss_of(*to_device(feed.take((step, positions)), engine.device))

    try:
        record = engine.step(micro_loss, positions_of(engine), stop)
        median = curve.add(record.loss)
        if median is not None:
            raise CheckFailed(f"the loss of step {step} jumped to {record.loss:.4g} from a median of {median:.4g}")
    except CheckFailed as error:
        kept = whole(checkpoints)
        raise CheckFailed(
            f"{error.message} (rows {_short(order.rows_of(step))})",
            hint=f"the last good checkpoint is {kept[-1]}; lower lr or clip, or look at those rows"
            if kept
            else "lower lr or clip",
        ) from error
    return record


def positions_of(engine: Engine) -> list[range]:
    """Positions in the global batch of each micro-batch of this rank."""
    start = engine.rank * engine.micro_batch * engine.accumulation
    return [
        range(start + i * engine.micro_batch, start + (i + 1) * engine.micro_batch) for i in range(engine.accumulation)
    ]


def _any_rank(condition: bool, engine: Engine) -> bool:
    return not distributed.agree(not condition, engine.device)


def _short(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (f", ... {len(rows)} in all" if len(rows) > 8 else "")


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


class _Metrics:
    """metrics.jsonl: one line per step. After a resume the lines of steps that will be repeated are dropped."""

    def __init__(self, path: Path, step: int):
        self.path, self._lines = path, []
        path.parent.mkdir(parents=True, exist_ok=True)
        kept_lines(path, lambda line: line["step"] < step)

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

    def __call__(self, number: int, frame: object) -> None:
        if self.pending:
            raise self.exception()
        self.received = number

    def exception(self) -> BaseException:
        return KeyboardInterrupt() if self.received == signal.SIGINT else Terminated()  # None: another rank got it


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
