"""`--track`: curves and pictures of a run in TensorBoard or Weights & Biases. Both packages are optional."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.spelling import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "tensorboard"  # in the run folder


class Tracker(Protocol):
    """What the console passes figures on to."""

    def scalars(self, label: str, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, label: str, step: int, image: Image) -> None: ...

    def close(self, failed: bool) -> None: ...


class Tracked(Protocol):
    """The console, as far as a tracker concerns it."""

    tracker: Tracker | None
    quiet: bool


def require(kind: str | None) -> None:
    """InputError when the package of a tracker is not installed; None needs nothing."""
    if kind is not None and importlib.util.find_spec(kind) is None:
        raise InputError(
            f"--track {kind} needs the package {kind}, which is not installed", f"pip install 'dcgen-convert[{kind}]'"
        )


@contextmanager
def tracking(console: Tracked, kind: str | None, run_dir: Path, recipe: dict[str, Any]) -> Iterator[None]:
    """Let ``console`` pass figures and pictures on while the body runs.

    Args:
        kind: "tensorboard" (event files in the run folder) | "wandb" (a run of the project dcgen-convert, which a
            resumed conversion continues; its files lie in the run folder too, and WANDB_MODE=offline sends nothing) |
            None.
        recipe: dotted key -> value, shown beside the curves.
    Raises:
        InputError: the package is not installed, or W&B does not start (no account, for one).
    """
    require(kind)
    if kind is None:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    console.tracker = (
        TensorBoard(run_dir, recipe) if kind == "tensorboard" else WeightsAndBiases(run_dir, recipe, console.quiet)
    )
    failed = True
    try:
        yield
        failed = False
    finally:
        if console.tracker is not None:
            console.tracker.close(failed)
        console.tracker = None


class TensorBoard:
    """Event files under ``run_dir``/tensorboard; `tensorboard --logdir` shows them."""

    def __init__(self, run_dir: Path, recipe: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / FOLDER))
        self._writer.add_text(
            "recipe", "\n".join(f"    {key}: {one_line(str(value))}" for key, value in recipe.items())
        )

    def scalars(self, label: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{label}/{key}", value, step)

    def picture(self, label: str, step: int, image: Image) -> None:
        import numpy

        self._writer.add_image(label, numpy.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:  # noqa: ARG002  event files hold no outcome
        self._writer.close()


class WeightsAndBiases:
    """One W&B run per run folder; quiet: without W&B's own lines on stderr."""

    def __init__(self, run_dir: Path, recipe: dict[str, Any], quiet: bool) -> None:
        import wandb

        self._image = wandb.Image
        identity = hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]
        settings = wandb.Settings(console="off", silent=quiet)  # the run folder has its own log
        try:
            self._run = wandb.init(
                project="dcgen-convert",
                name=run_dir.name,
                id=identity,
                resume="allow",
                dir=str(run_dir),
                config=recipe,
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise InputError(
                f"Weights & Biases does not start: {str(error).splitlines()[0]}",
                "wandb login, or set WANDB_MODE=offline and send the run later with wandb sync",
            ) from error
        self._labels: set[str] = set()

    def scalars(self, label: str, step: int, values: Mapping[str, float]) -> None:
        self._log(label, step, {f"{label}/{key}": value for key, value in values.items()})

    def picture(self, label: str, step: int, image: Image) -> None:
        self._log(label, step, {f"{label}/picture": self._image(image)})

    def _log(self, label: str, step: int, values: dict[str, Any]) -> None:
        # Every stage counts its own steps; W&B's counter only grows.
        if label not in self._labels:
            self._labels.add(label)
            self._run.define_metric(f"{label}/*", step_metric=f"{label}/step")
        self._run.log({**values, f"{label}/step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
