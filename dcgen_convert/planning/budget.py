"""A budget of GPU-hours, and what follows from it: pictures, steps of every phase, rows of the head's start.

The bill (`planning.bill`) says what a conversion costs. Some of it is the same for any number of pictures and steps:
downloads, merges, the quantiser, the check of the bundle. What is left is given to the pictures and to the phases by
their shares. A part never gets more than the recipe asks for. What it does not need goes to the others, in proportion
to their shares.

With u_i GPU-hours per picture or step of part i and s_i its share, part i does min(most_i, k s_i / u_i) of them. The
largest k is sought whose whole bill is within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.progress import duration
from dcgen_convert.planning.bill import Observed, bill
from dcgen_convert.planning.present import counted
from dcgen_convert.planning.shapes import Shapes
from dcgen_convert.recipe.head_rows import USUAL
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Phase, Recipe
from dcgen_convert.recipe.settings import leaves

DRAWS, HEAD_STEPS = "align_head.draws", "align_head.steps"
COUNT = "data.count"  # ends the keys of all numbers of pictures
LEAST, LEAST_STEPS = 256, 50  # pictures of a set, and steps of a phase, below which nothing is learned
WARM = 4  # the warm-up takes at most this part of a phase
ENOUGH, TRIES = 0.995, 40  # the search for k ends at this part of the budget
EXPLICIT = ("flag ", "--set", "env ")  # origins of what the user has said for this conversion


@dataclass(frozen=True)
class Dial:
    """What the budget decides: the setting ``key``, between ``least`` and ``most``.

    each: GPU-hours of one picture or step. share: of what is left after the stages that cost the same.
    """

    key: str
    least: int
    most: int
    each: float = 0.0
    share: float = 0.0

    def at(self, k: float) -> int:
        """How many are done with ``k`` GPU-hours for all shares together; three digits, so that people can read it."""
        wanted = k * self.share / self.each if self.each else math.inf
        return self.most if wanted >= self.most else max(self.least, _short(wanted))


def applied(
    resolved: Resolved,
    sizes: Callable[[], Shapes],
    gpus: int,
    measured: Observed | None = None,
    before: Callable[[], Resolved | None] = lambda: None,
) -> Resolved:
    """``resolved`` with the numbers that its budget gives; as it is when it has none.

    Args:
        sizes: of the conversion; asked only if there is a budget.
        gpus: ranks of the job.
        measured: what a rehearsal found; None: assumed rates.
        before: what the run folder was started with, if it is there. With the same budget its numbers stay.
    Raises:
        InputError: the budget is too small; the message names the smallest.
    """
    recipe = resolved.recipe
    if not recipe.budget.gpu_hours and not recipe.budget.hours:
        return resolved
    shapes = sizes()
    hours = _allowed(recipe, shapes, gpus)
    chosen = recipe.budget.model_copy(update={"gpu_hours": _of_tokens(recipe, shapes) or 0.0})
    recipe, origins = recipe.model_copy(update={"budget": chosen}), resolved.origins
    resolved = replace(resolved, recipe=recipe)
    if not hours:
        tokens = shapes.drawn(shapes.new, recipe.adapt.phases[-1].resolution)
        line = f"The recipe has no budget for a model with {tokens:,} image tokens: it is carried out as written."
        return replace(resolved, derivation=(line, "Option --max-gpu-hours sets a budget."))
    said = {key for key, value in origins.items() if value.startswith(EXPLICIT)}
    kept = _kept(resolved, before())
    told: list[str] = []
    if kept:
        changed = _set(recipe, {key: value for key, value in kept.items() if key not in said})
        lines = [f"The run has its numbers already, from the same budget of {hours:,.4g} GPU-hours. They stay."]
    else:
        there, told = counted(recipe, shapes.source)
        changed, lines = derive(there, shapes, gpus, hours, said, measured)
        named = {key: value for key, value in _counts(recipe).items() if key in said}
        changed = recipe if changed is there else _set(changed, named)
    lines = [*told, *lines]
    old, new = (dict(leaves(part.model_dump(mode="json"))) for part in (recipe, changed))
    derived = {key: f"derived: budget of {hours:,.4g} GPU-hours" for key in new if new[key] != old.get(key)}
    return replace(resolved, recipe=changed, origins={**origins, **derived}, derivation=tuple(lines))


def derive(
    recipe: Recipe,
    sizes: Shapes,
    gpus: int,
    hours: float,
    said: Collection[str] = (),
    measured: Observed | None = None,
) -> tuple[Recipe, list[str]]:
    """The recipe that ``hours`` GPU-hours pay for, and why its numbers are what they are, line by line.

    Args:
        gpus: ranks that share the work.
        said: dotted keys whose values stay, because the user named them.
        measured: what a rehearsal found; None: assumed rates.
    Raises:
        InputError: the budget is too small; the message names the smallest.
    """

    def cost(values: Mapping[str, int]) -> float:
        made = _with(recipe, sizes, values, said)
        return float(bill(made, sizes, gpus, measured)["gpu_hours"])

    whole_bill = bill(recipe, sizes, gpus, measured)
    written = float(whole_bill["gpu_hours"])
    allowed = f"The budget is {hours:,.4g} GPU-hours: {duration(hours / gpus * 3600)} on {gpus} x "
    allowed += f"{whole_bill['device']}. The recipe as written takes {written:,.4g}"
    if written <= hours:
        return recipe, [f"{allowed}, so it is carried out as written."]
    bounds = _parts(recipe, said)
    most, least = ({part.key: getattr(part, end) for part in bounds} for end in ("most", "least"))
    whole, smallest = cost(most), cost(least)
    if smallest > hours:
        raise _too_small(smallest, hours, gpus, recipe)
    priced = [
        replace(part, each=(whole - cost({**most, part.key: part.least})) / max(1, part.most - part.least))
        for part in bounds
    ]
    parts = _shared(recipe, priced)
    k = math.inf if whole <= hours else _search(lambda k: cost({part.key: part.at(k) for part in parts}), parts, hours)
    values = {part.key: part.at(k) for part in parts}
    changed = _with(recipe, sizes, values, said)
    fixed = smallest - sum(part.each * part.least for part in parts)
    lines = [
        f"{allowed}.",
        f"About {max(0.0, fixed):,.3g} GPU-hours are the same for any number of pictures and steps.",
        *(_line(recipe, changed, part, values[part.key]) for part in parts),
        *_lines_of_head(recipe, changed),
        *(f"{key} stays {value:,}: it was asked for." for key, value in _named(recipe, said)),
    ]
    return changed, [*lines, f"In all: {cost(values):,.4g} of {hours:,.4g} GPU-hours."]


def _allowed(recipe: Recipe, sizes: Shapes, gpus: int) -> float:
    """GPU-hours that may be spent; 0: no budget."""
    both = (_of_tokens(recipe, sizes) or 0.0, recipe.budget.hours * gpus)
    return min((hours for hours in both if hours), default=0.0)


def _of_tokens(recipe: Recipe, sizes: Shapes) -> float | None:
    """`budget.gpu_hours` for the model of this conversion; None where its table has no such size."""
    value = recipe.budget.gpu_hours
    if not isinstance(value, dict):
        return value
    tokens = sizes.drawn(sizes.new, recipe.adapt.phases[-1].resolution)
    return next((value[size] for size in sorted(value) if tokens <= size), None)


def _parts(recipe: Recipe, said: Collection[str]) -> list[Dial]:
    """What the budget decides, without what the user has named."""
    written = _counts(recipe) | {_steps(number): phase.steps for number, phase in enumerate(recipe.adapt.phases)}
    least = {key: LEAST if key.endswith(COUNT) else LEAST_STEPS for key in written}
    return [Dial(key, min(most, least[key]), most) for key, most in written.items() if key not in said]


def _count(number: int) -> str:
    """The key of the number of pictures in set ``number``."""
    return f"adapt.phases.{number - 1}.{COUNT}" if number else COUNT


def _counts(recipe: Recipe) -> dict[str, int]:
    """The number of pictures of every set that a phase is trained on, by its key."""
    return {_count(number): recipe.data_of(number).count for number in recipe.sets}


def _steps(number: int) -> str:
    return f"adapt.phases.{number}.steps"


def _shared(recipe: Recipe, parts: list[Dial]) -> list[Dial]:
    """The parts with their shares. Those without one divide the rest in proportion to what they cost as written."""
    given: dict[str, float | None] = dict.fromkeys(map(_count, recipe.sets))
    given |= {COUNT: recipe.data.share}
    given |= {_steps(number): phase.share for number, phase in enumerate(recipe.adapt.phases)}
    rest = 1.0 - sum(share or 0.0 for share in given.values())
    open_cost = sum(part.each * part.most for part in parts if given[part.key] is None) or 1.0
    found = []
    for part in parts:
        share = given[part.key]
        found.append(replace(part, share=rest * part.each * part.most / open_cost if share is None else share))
    total = sum(part.share for part in found) or 1.0
    return [replace(part, share=part.share / total) for part in found]


def _search(cost: Callable[[float], float], parts: list[Dial], hours: float) -> float:
    """The largest k, nearly, whose cost is within ``hours``: by straight lines, since the cost nearly is one."""
    low, high = 0.0, max((part.most * part.each / part.share for part in parts if part.share), default=0.0)
    below, above = cost(low), cost(high)
    if above <= hours:
        return high  # a part without a share stays at its least
    for _ in range(TRIES):
        if below >= ENOUGH * hours:
            break
        place = ((1 + ENOUGH) / 2 * hours - below) / (above - below)
        k = low + (high - low) * min(0.98, max(0.02, place))
        found = cost(k)
        if found <= hours:
            low, below = k, found
        else:
            high, above = k, found
    return low


def _short(value: float) -> int:
    """Rounded down to three digits."""
    unit = 10 ** max(0, math.floor(math.log10(value)) - 2) if value >= 1 else 1
    return int(value // unit * unit)


def _with(recipe: Recipe, sizes: Shapes, values: Mapping[str, int], said: Collection[str]) -> Recipe:
    """The recipe with ``values`` for the parts, and with what follows from them."""
    found = dict(values)
    for number, phase in enumerate(recipe.adapt.phases):
        steps = values.get(_steps(number), phase.steps)
        if steps != phase.steps:
            found[f"adapt.phases.{number}.warmup"] = min(phase.warmup, steps // WARM)
    aligned = recipe.aligned_set
    pictures = values.get(_count(aligned), _first_count(recipe))
    rows = pictures * sizes.drawn(sizes.new, recipe.adapt.phases[0].resolution)
    found[DRAWS] = min(recipe.align_head.draws, math.ceil(2 * USUAL * sizes.base.width / rows))
    found[HEAD_STEPS] = 0
    return _set(recipe, {key: value for key, value in found.items() if key not in said})


def _set(recipe: Recipe, values: Mapping[str, int]) -> Recipe:
    """The recipe with the numbers that a budget decides, by their dotted keys."""

    def of(prefix: str) -> dict[str, int]:
        return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}

    def of_phase(number: int, phase: Phase) -> Phase:
        found: dict[str, Any] = of(f"adapt.phases.{number}.")
        count = found.pop(COUNT, None)
        if phase.data is not None and count is not None:
            found["data"] = phase.data.model_copy(update={"count": count})
        return phase.model_copy(update=found)

    changed = tuple(of_phase(number, phase) for number, phase in enumerate(recipe.adapt.phases))
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=of("data.")),
            "align_head": recipe.align_head.model_copy(update=of("align_head.")),
            "adapt": recipe.adapt.model_copy(update={"phases": changed}),
        }
    )


def _kept(resolved: Resolved, before: Resolved | None) -> dict[str, int]:
    """The numbers of a run that was begun with the same budget, for the same models and sizes; else none."""
    if before is None:
        return {}
    mine, theirs = resolved.recipe, before.recipe
    same = all(getattr(mine, key) == getattr(theirs, key) for key in ("budget", "source", "ae", "ae_channels"))
    sides = [[phase.resolution for phase in recipe.adapt.phases] for recipe in (mine, theirs)]
    ranks = not mine.budget.hours or before.machine.gpus == resolved.machine.gpus
    if not same or sides[0] != sides[1] or not ranks:
        return {}
    found = {**_counts(theirs), HEAD_STEPS: theirs.align_head.steps, DRAWS: theirs.align_head.draws}
    for number, phase in enumerate(theirs.adapt.phases):
        found |= {_steps(number): phase.steps, f"adapt.phases.{number}.warmup": phase.warmup}
    return found


def _too_small(smallest: float, hours: float, gpus: int, recipe: Recipe) -> InputError:
    unit = 10.0 ** (math.floor(math.log10(smallest)) - 2)
    needed = math.ceil(smallest / unit) * unit
    option = f"--max-gpu-hours {needed:.4g}"
    if recipe.budget.hours and recipe.budget.hours * gpus <= hours:
        option = f"--hours {needed / gpus * 1.0001:.4g}"
    message = f"a budget of {hours:,.4g} GPU-hours is too small for this conversion, the smallest is {needed:,.4g}"
    return InputError(message, f"give {option} or more; --max-gpu-hours 0 carries the recipe out as written")


def _named(recipe: Recipe, said: Collection[str]) -> list[tuple[str, int]]:
    """What the budget would have decided, but the user has said: (key, value)."""
    values = {**_counts(recipe), HEAD_STEPS: recipe.align_head.steps, DRAWS: recipe.align_head.draws}
    values |= {_steps(number): phase.steps for number, phase in enumerate(recipe.adapt.phases)}
    return [(key, value) for key, value in values.items() if key in said]


def _line(recipe: Recipe, changed: Recipe, part: Dial, value: int) -> str:
    """One part in a sentence."""
    cost, share = f"{value * part.each:,.3g} GPU-hours", f"{part.share:.0%} of the rest"
    if part.key.endswith(COUNT):
        number = next(number for number in recipe.sets if _count(number) == part.key)
        own, sides = recipe.data_of(number).kind == "folder", " and ".join(map(str, recipe.sides(number)))
        what = f"at most {value:,} of your pictures" if own else f"{value:,} pictures, drawn and encoded"
        what += f" for {sides} px" if len(recipe.sets) > 1 else ""
    else:
        phase = changed.adapt.phases[int(part.key.split(".")[2])]
        warm = f", {phase.warmup:,} of them to warm up" if phase.warmup else ""
        what = f"{value:,} steps at {phase.resolution} px{warm}"
    why = "all that the recipe asks for" if value == part.most else f"the recipe asks for {part.most:,}"
    return f"{part.key}: {what}, for {cost}. Its share is {share}; {why}."


def _first_count(recipe: Recipe) -> int:
    """The number of pictures that the alignment has."""
    return recipe.data_of(recipe.aligned_set).count


def _lines_of_head(recipe: Recipe, changed: Recipe) -> list[str]:
    lines = []
    before, after = recipe.align_head, changed.align_head
    if before.steps != after.steps:
        lines.append(
            f"{HEAD_STEPS}: 0 instead of {before.steps:,}. On the miniatures the same time did more in the phases."
        )
    if before.draws != after.draws:
        lines.append(
            f"{DRAWS}: {after.draws} instead of {before.draws}. With {_first_count(changed):,} pictures that is at "
            "least twice the rows that the start of the head is expected to take."
        )
    return lines
