"""Settings that this source, or this number of ranks, cannot have."""

from __future__ import annotations

from pathlib import Path

from dcgen_convert.checkpoint.source import Source
from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.core.journal import MARKER
from dcgen_convert.networks.pipelines import stock_pipeline
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages import records
from dcgen_convert.stages.folders import ALIGN_HEAD, adapt_stage

MERGED = "--merge-lora adds it to the weights"


def require_apart(recipe: Recipe, source: Source) -> None:
    """InputError where a LoRA is to be kept apart and the stock pipeline cannot load one."""
    if not recipe.merge_lora and not hasattr(stock_pipeline(source), "load_lora_weights"):
        raise InputError(f"the stock {source.family.pipeline_class} cannot load a LoRA apart", MERGED)


def require_for_several(recipe: Recipe, source: Source) -> None:
    """RecipeError for settings that a model with several networks cannot have."""
    count, kind = len(source.experts), source.family.name
    if count > 1 and not recipe.merge_lora:
        raise RecipeError(
            f"a {kind} model has {count} networks, each with a LoRA, and a bundle keeps at most one apart",
            MERGED,
        )
    if count > 1 and any(phase.consistency for phase in recipe.adapt.phases):
        raise RecipeError(
            f"a {kind} model has {count} networks, and consistency distillation leads from the noise levels of one to "
            "those of another",
            "set the phases' consistency to 0",
        )


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
