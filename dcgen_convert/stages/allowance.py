"""How long a phase may train under the recipe's budget: its part of the time that is left.

The plan's rates are assumptions. When the work before a phase took longer than planned, or its own steps do, the phase
ends early instead of spending more than the budget.
"""

from __future__ import annotations

from dcgen_convert.planning import needs
from dcgen_convert.planning.bill import bill
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages import folders
from dcgen_convert.stages.depends import ADAPT, IMPORT, kind_of
from dcgen_convert.stages.job import Job

RESERVE = 0.01  # of the time of a phase: for the evaluation and the export at its end


def seconds(job: Job, number: int) -> float | None:
    """Wall-clock seconds that phase ``number`` may still take; None without a budget. 0 when all is spent.

    Time of earlier starts counts, of this stage and of those before it, as if they had as many ranks as this one.
    """
    total = budget_seconds(job.recipe, job.crew.world)
    if total is None:
        return None
    sizes = shapes_of(job.recipe, job.identity)
    rows = bill(job.recipe, sizes, job.crew.world)["stages"]
    planned = {row["stage"]: 3600 * row["wall_hours"] for row in rows}
    names = [IMPORT, *needs.stages(job.recipe, False, sizes.experts)]
    here = job.expert.of(folders.adapt_stage(number))
    done, left = names[: names.index(here)], names[names.index(here) :]
    trainings = [name for name in left if kind_of(name) == ADAPT]
    after = sum(planned.get(name, 0.0) for name in left if name not in trainings)
    seconds = total - after - sum(job.run.spent(name) for name in done)
    own = seconds * planned[here] / sum(planned[name] for name in trainings)
    return max(0.0, own * (1 - RESERVE) - job.run.spent(here))


def budget_seconds(recipe: Recipe, ranks: int) -> float | None:
    """Wall-clock seconds that the whole conversion may take on so many ranks; None without a budget."""
    hours, wall = recipe.budget.gpu_hours, recipe.budget.hours
    assert not isinstance(hours, dict), "a budget that was applied is one number"
    limits = [limit for limit in (hours / ranks, wall) if limit]
    return 3600 * min(limits) if limits else None
