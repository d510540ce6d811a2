"""What no machine can do with this source: said before any work is done."""

from __future__ import annotations

from collections.abc import Iterator

from dcgen_convert.core.errors import DcgenError, InputError, RecipeError
from dcgen_convert.planning.quantised import quantised_linears
from dcgen_convert.planning.shapes import Shapes, shapes_of
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.schema import Recipe

MERGED = "--merge-lora adds it to the weights"


def require_possible(recipe: Recipe, source: Identity) -> None:
    """InputError or RecipeError for a conversion that no machine can do."""
    for problem in impossible(recipe, shapes_of(recipe, source)):
        raise problem


def impossible(recipe: Recipe, sizes: Shapes) -> Iterator[DcgenError]:
    """Settings of several networks that one model cannot have, a LoRA that no pipeline loads, linears that no 4-bit
    format holds.
    """
    count, kind = sizes.networks, sizes.family.name
    if count > 1 and not recipe.merge_lora:
        yield RecipeError(
            f"a {kind} model has {count} networks, each with a LoRA, and a bundle keeps at most one apart", MERGED
        )
    if count > 1 and any(phase.consistency for phase in recipe.adapt.phases):
        yield RecipeError(
            f"a {kind} model has {count} networks, and consistency distillation leads from the noise levels of one to "
            "those of another",
            "set the phases' consistency to 0",
        )
    if not recipe.merge_lora and not hasattr(stock := _stock_pipeline(sizes.source), "load_lora_weights"):
        yield InputError(f"the stock {stock.__name__} cannot load a LoRA apart", MERGED)
    for message, hint in quantised_linears(recipe.quantize, sizes)[1]:
        yield InputError(message, hint)


def _stock_pipeline(source: Identity) -> type:
    """The stock pipeline class of ``source``. Only a LoRA apart asks for it, because it needs torch."""
    from dcgen_convert.networks.pipelines import stock_pipeline

    found: type = stock_pipeline(source.family, source.pipeline_index or {})
    return found
