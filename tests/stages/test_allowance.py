"""How long a phase may train: its part of what the budget has left."""

from types import SimpleNamespace

import pytest

from dcgen_convert.families.experts import WHOLE
from dcgen_convert.planning.bill import bill
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import allowance

TWO_PHASES = "adapt.phases=[{resolution: 128, steps: 5200, batch: 64}, {resolution: 128, steps: 2500, batch: 64}]"
SPENT = {"surgery": 10.0, "data": 200.0, "latents": 30.0, "align-embedder": 5.0, "align-head": 15.0}


def job(spent: dict[str, float], ranks: int = 1, **budget: float) -> SimpleNamespace:
    """tiny-flux in two phases, with a budget, as far as the arithmetic looks at a job."""
    resolved = load("tiny-flux", sets=[TWO_PHASES, *(f"budget.{key}={value}" for key, value in budget.items())])
    run = SimpleNamespace(spent=lambda name: spent.get(name, 0.0))
    crew = SimpleNamespace(world=ranks)
    return SimpleNamespace(recipe=resolved.recipe, identity=resolved.identity, crew=crew, run=run, expert=WHOLE)


def planned(ranks: int = 1) -> dict[str, float]:
    resolved = load("tiny-flux", sets=[TWO_PHASES])
    rows = bill(resolved.recipe, shapes_of(resolved.recipe, resolved.identity), ranks)["stages"]
    return {row["stage"]: 3600 * row["wall_hours"] for row in rows}


@pytest.mark.parametrize(("ranks", "budget"), [(1, {"gpu_hours": 0.5}), (4, {"gpu_hours": 2.0}), (4, {"hours": 0.5})])
def test_a_phase_gets_its_part_of_what_is_left(ranks, budget):
    rows = planned(ranks)
    after = sum(rows[name] for name in ("merge-1", "merge-2", "bundle", "verify"))
    left = 1800 - sum(SPENT.values()) - after
    part = rows["adapt-1"] / (rows["adapt-1"] + rows["adapt-2"])
    assert allowance.seconds(job(SPENT, ranks, **budget), 1) == pytest.approx(0.99 * left * part)
    begun = {**SPENT, "adapt-1": 100.0}  # of an earlier start
    assert allowance.seconds(job(begun, ranks, **budget), 1) == pytest.approx(0.99 * left * part - 100)
    later = {**SPENT, "adapt-1": 400.0, "merge-1": 7.0}
    left = 1800 - sum(later.values()) - after + rows["merge-1"]
    assert allowance.seconds(job(later, ranks, **budget), 2) == pytest.approx(0.99 * left)


def test_nothing_is_left_of_a_budget_that_is_spent_and_no_budget_sets_no_limit():
    assert allowance.seconds(job({"data": 2000.0}, gpu_hours=0.5), 1) == 0
    assert allowance.seconds(job(SPENT), 1) is None
    both = allowance.seconds(job(SPENT, gpu_hours=0.5, hours=0.4), 1)
    assert both == allowance.seconds(job(SPENT, hours=0.4), 1) < allowance.seconds(job(SPENT, gpu_hours=0.5), 1)
