"""Settings that this number of ranks cannot have."""

from __future__ import annotations

from pathlib import Path

from dcgen_convert.core.errors import RecipeError
from dcgen_convert.core.journal import MARKER
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages import records
from dcgen_convert.stages.folders import ALIGN_HEAD, adapt_stage


def require_even(recipe: Recipe, run_dir: Path, world: int) -> None:
    """RecipeError when a batch cannot be divided evenly among the ranks. It comes now, not after hours of synthesis.

    Stages that are done already do not count: another number of ranks may have done them.
    """
    batches = {
        adapt_stage(n): (f"adapt.phases.{n - 1}.batch", phase.batch) for n, phase in enumerate(recipe.adapt.phases, 1)
    }
    if recipe.align_head.steps:
        batches = {ALIGN_HEAD: ("align_head.batch", recipe.align_head.batch), **batches}
    experts = records.experts(run_dir)
    still = {stage for stage in batches if not all((run_dir / one.of(stage) / MARKER).exists() for one in experts)}
    uneven = [pair for stage, pair in batches.items() if pair[1] % world and stage in still]
    if uneven:
        named = ", ".join(f"{key} = {batch}" for key, batch in uneven)
        even = " ".join(f"--set {key}={-(-batch // world) * world}" for key, batch in uneven)
        raise RecipeError(f"{world} ranks cannot share these batches evenly: {named}", even)
