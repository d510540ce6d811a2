"""The sizes that every part of a plan starts from: both transformers, both grids, text tokens, trained parameters."""

from __future__ import annotations

from dataclasses import dataclass

from dcgen_convert.families import Family
from dcgen_convert.families.grid import Grid
from dcgen_convert.planning.arithmetic import Trainable, trainable
from dcgen_convert.planning.layers import Structure
from dcgen_convert.planning.structures import structure
from dcgen_convert.recipe import geometry, sources
from dcgen_convert.recipe.schema import Phase, Recipe


@dataclass(frozen=True)
class Shapes:
    """Before and after the swap. text: tokens per prompt, 0 for class-conditional models."""

    family: Family
    base: Structure
    converted: Structure
    old: Grid
    new: Grid
    text: int

    def trainable(self, phase: Phase) -> Trainable:
        """What a phase trains: LoRA on its targets and the whole embedder and head, or everything."""
        family = self.family
        targets = phase.targets or family.lora_targets
        return trainable(self.converted, phase.mode, phase.rank, targets, (family.embedder, family.head))

    def tokens(self, phase: Phase) -> int:
        """Image + text tokens per picture that the converted model sees in a phase."""
        return self.new.tokens(phase.resolution) + self.text


def shapes(recipe: Recipe, offline: bool = False) -> Shapes:
    """Read the configs that the recipe names; no weights.

    Raises:
        InputError: a transformer class that no family handles. AccessError: a hub config that cannot be had.
    """
    config = sources.transformer_config(recipe.source, offline, recipe.base)
    family = sources.family_of(config, recipe.source)
    old = geometry.base_grid(recipe.source, offline, recipe.base)
    new = geometry.new_grid(recipe.ae, offline, recipe.ae_channels)
    base = structure(config)
    converted = structure(family.convert_config(config, new.f, new.c, recipe.adapt.phases[-1].resolution))
    text = (recipe.latents.text_length or family.text_length) if base.text_width else 0
    return Shapes(family, base, converted, old, new, text)
