"""A rehearsal: the small recipe that runs every stage at full size, and the file with what it measured.

The real run's seconds are what a unit of work took, times the units of the real run, plus the rest of each stage. The
real run's memory is what the stage took, and for more pictures at once what the arithmetic adds for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object, understood
from dcgen_convert.core.progress import duration
from dcgen_convert.planning.bill import REST, Measured, works
from dcgen_convert.planning.needs import OF_EVERY_NETWORK
from dcgen_convert.planning.rates import CPUS, H100, Device
from dcgen_convert.planning.shapes import Shapes
from dcgen_convert.recipe.schema import Phase, Recipe
from dcgen_convert.recipe.settings import leaves

SCHEMA = "dcgen.rehearsal/1"
FEWEST = 2  # pictures, drawing steps, steps of a training
MOST_STEPS = 12  # of a training
LONG, SHORT = 60.0, 15.0  # seconds by the assumed rates: of one piece of work at full batch, of all steps of a training
ANY_SCALE = 1000.0  # two pictures, or random weights, say nothing of an autoencoder's scale
# What may differ between a rehearsal and the run that is planned from it: how much is done, and what only decides how
# it is looked at.
FREE = (
    "name", "seed", "keep", "budget", "data.share",
    "data.count", "data.steps", "data.batch", "data.max_broken", "data.prompts",
    "data.guidance", "latents.batch", "latents.scale_tolerance", "latents.scale_override", "align_embedder",
    "align_head.steps", "align_head.batch", "align_head.lr", "align_head.warmup", "align_head.draws", "align_head.clip",
    "adapt.ema", "adapt.clip", "adapt.text_drop", "quantize.calibration", "bundle.steps", "evaluate", "watch",
)  # fmt: skip
FREE_OF_A_PHASE = ("share", "steps", "batch", "micro_batch", "lr", "warmup", "schedule", "clip", "alpha")


def small(
    recipe: Recipe,
    sizes: Shapes,
    ranks: int,
    device: Device,
    micro_batch: Callable[[Phase], int],
    pictures: int | None = None,
    steps: int | None = None,
) -> tuple[Recipe, list[str]]:
    """The recipe of a rehearsal, and how its numbers follow, in words.

    As many pictures are taken, and trained on at once, as in the real run where that takes a minute at most by the
    assumed rates. Else two, and one.

    Args:
        ranks, device: of this rehearsal.
        micro_batch: phase -> pictures that a rank of the real run trains on at once.
        pictures, steps: as the user wants them; None: derived.
    """
    rates, every = device.rates, list(works(recipe, sizes))

    def seconds(stage: str, what: str) -> float:
        """Of one unit, by the assumed rates; 0 for what the run does not do. Of the networks, the first."""
        stage = sizes.experts[0].of(stage) if stage.startswith(OF_EVERY_NETWORK) else stage
        return sum(work.each / rates[work.kind].expected for work in every if (work.stage, work.what) == (stage, what))

    drawn = FEWEST * seconds("data", "draw") + seconds("data", "decode")
    full = max(recipe.data.batch, recipe.latents.batch) * ranks
    count = pictures or max(FEWEST, min(full, int(LONG / drawn) if drawn else full, recipe.data.count))
    drawing = steps or FEWEST
    told = [f"{count} pictures of {recipe.data.resolution} px, {drawing} drawing steps"]
    sized = [
        _sized(micro_batch(phase), seconds(f"adapt-{number}", "train"), steps)
        for number, phase in enumerate(recipe.adapt.phases, 1)
    ]
    long = min(steps for _, steps in sized)  # the same for all: each draws one grid, at its end
    phases = []
    for number, (phase, (size, _)) in enumerate(zip(recipe.adapt.phases, sized, strict=True), 1):
        own = phase.data and phase.data.model_copy(update={"count": count, "steps": drawing})
        short = {"steps": long, "batch": size * ranks, "micro_batch": None, "data": own}
        phases.append(phase.model_copy(update=short))
        told.append(f"phase {number}: {long} steps of {size * ranks} pictures of {phase.resolution} px")
    head = recipe.align_head.model_copy(update={"draws": min(FEWEST, recipe.align_head.draws)})
    if head.steps:
        size, most = _sized(max(1, head.batch // ranks), seconds("align-head", "train"), steps)
        head = head.model_copy(update={"steps": most, "batch": size * ranks})
        told.append(f"head: {most} steps of {size * ranks} pictures")
    grid = long if recipe.watch.grid_every else 0
    watch = {"evaluate_every": 0, "grid_every": grid, "pictures": min(FEWEST, recipe.watch.pictures)}
    calibration = {"prompts": min(FEWEST, recipe.quantize.calibration.prompts), "steps": FEWEST}
    changes: dict[str, Any] = {
        "budget": {"gpu_hours": 0.0, "hours": 0.0},
        "data": {"count": count, "steps": drawing},
        "latents": {"scale_tolerance": ANY_SCALE},
        "adapt": {"phases": tuple(phases)},
        "quantize": {"calibration": recipe.quantize.calibration.model_copy(update=calibration)},
        "bundle": {"steps": drawing},
        "evaluate": {"prompts": min(FEWEST, recipe.evaluate.prompts)},
        "watch": watch,
    }
    parts = {name: getattr(recipe, name).model_copy(update=values) for name, values in changes.items()}
    return Recipe.model_validate(recipe.model_copy(update={**parts, "align_head": head}).model_dump(mode="json")), told


def _sized(full: int, each: float, steps: int | None) -> tuple[int, int]:
    """(pictures per rank, steps) of a training whose sample takes ``each`` seconds by the assumed rates."""
    size = max(1, min(full, int(LONG / each) if each else full))
    return size, steps or max(FEWEST, min(MOST_STEPS, int(SHORT / (size * each)) if each else MOST_STEPS))


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal measured.

    peaks: stage -> {"host", "gpu"} bytes. recipe: that it ran. machine: what it ran on; ranks: how many; gpu: whether
    they had GPUs; memory: bytes that each could train in.
    """

    stages: dict[str, Measured]
    peaks: dict[str, dict[str, float]]
    recipe: dict[str, Any]
    machine: Device
    ranks: int
    gpu: bool
    memory: float


def rows(
    stages: list[dict[str, Any]], figures: dict[str, dict[str, dict[str, float]]], total: float
) -> list[dict[str, Any]]:
    """One row per stage of a finished rehearsal: seconds, those of a unit of each kind of work, the rest, the peak.

    Args:
        stages: name, seconds and peak of each, as a conversion returns them.
        figures: as `core.clock.Clock.figures` gives them.
        total: seconds of everything; what no stage took is the start.
    """
    start = max(0.0, total - sum(row["seconds"] for row in stages))
    found = []
    for row in ({"name": "start", "seconds": start, "peak": {}}, *stages):
        work = figures.get(row["name"], {})
        counted = sum(kind["count"] * kind["seconds_each"] for kind in work.values())
        rest = max(0.0, row["seconds"] - counted)
        found.append(
            {
                "stage": row["name"],
                "seconds": round(row["seconds"], 3),
                "rest": round(rest, 3),
                "work": work,
                "peak": row["peak"],
            }
        )
    return found


def read(file: Path, recipe: Recipe) -> Rehearsal:
    """The rehearsal in ``file``, for a plan of ``recipe``.

    Raises:
        InputError: no finished rehearsal, or one of another conversion.
    """
    hint = "dcgen-convert rehearse SOURCE ... writes one"
    document = read_object(file, hint)
    if document.get("schema") != SCHEMA:
        raise InputError(f"{file} is no rehearsal: its schema is {str(document.get('schema'))[:60]!r}", hint)
    if document.get("status") != "done":
        raise InputError(f"the rehearsal of {file} has not ended", "run it again with the same arguments")
    with understood(file):
        found = Rehearsal(
            {
                row["stage"]: Measured(
                    {what: _seconds(kind["seconds_each"]) for what, kind in row["work"].items()}, _seconds(row["rest"])
                )
                for row in document["stages"]
            },
            {row["stage"]: {kind: _seconds(size) for kind, size in row["peak"].items()} for row in document["stages"]},
            dict(document["recipe"]),
            device_of(str(document["device"]), bool(document["gpu"])),
            int(document["ranks"]),
            bool(document["gpu"]),
            _seconds(document["memory"]),
        )
        before = dict(document["conversion"])
    now = conversion_of(recipe)
    if different := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        shown = ", ".join(f"{key} {before.get(key)!s} there and {now.get(key)!s} here" for key in different[:3])
        raise InputError(f"{file} rehearsed another conversion: {shown}", "rehearse with the settings of the run")
    return found


def device_of(name: str, gpu: bool) -> Device:
    """The device that a rehearsal ran on; its rates are assumed where nothing was measured."""
    return replace(H100 if gpu else CPUS, name=name)


def _seconds(value: Any) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{value} is no amount")
    return number


def conversion_of(recipe: Recipe) -> dict[str, Any]:
    """What a rehearsal and a real run must have in common: dotted key -> value."""
    values = recipe.model_dump(mode="json")
    phases = values["adapt"].pop("phases")
    kept = {
        key: value
        for key, value in leaves(values)
        if not any(key == free or key.startswith(f"{free}.") for free in FREE)
    }
    for number, phase in enumerate(phases):
        phase["data"] = {key: value for key, value in (phase["data"] or {}).items() if f"data.{key}" not in FREE}
        kept |= {f"adapt.phases.{number}.{key}": value for key, value in phase.items() if key not in FREE_OF_A_PHASE}
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def table(stages: list[dict[str, Any]]) -> list[str]:
    """The measured figures as lines of text."""
    lines = [f"  {'stage':<15}{'took':>12}  {'host':>9}  {'GPU':>9}  seconds of a unit, and the rest"]
    for row in stages:
        host, gpu = (_gib(row["peak"].get(kind)) for kind in ("host", "gpu"))
        units = [f"{what} {kind['seconds_each']:.3g} s" for what, kind in row["work"].items()]
        shown = ", ".join([*units, f"{REST} {row['rest']:.3g} s"])
        lines.append(f"  {row['stage']:<15}{duration(row['seconds']):>12}  {host:>9}  {gpu:>9}  {shown}")
    return lines


def _gib(size: float | None) -> str:
    return "" if not size else f"{size / 2**30:.2f} GiB"
