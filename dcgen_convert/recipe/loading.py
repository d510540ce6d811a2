"""Recipes: finding them, layering settings over them, and remembering where every value came from.

Precedence, strongest first: flag > --set > environment (DCGEN_CONVERT_ADAPT__EMA=0.99) > recipe > family's recipe >
default. `load` is the only entrance; it returns a `Resolved`, whose `origins` names the layer of each dotted key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from pydantic import ValidationError

from dcgen_convert.core.errors import AccessError, RecipeError
from dcgen_convert.families import Family
from dcgen_convert.ranks.machine import Machine
from dcgen_convert.recipe import curricula, drawable, geometry, sources
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.pictures import Data
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.recipe.settings import Layers, one_sentence
from dcgen_convert.recipe.shelf import read

ENV_PREFIX = "DCGEN_CONVERT_"


@dataclass(frozen=True)
class Resolved:
    """A recipe with every value decided.

    origins: dotted key -> "flag --ae" | "--set" | "env DCGEN_CONVERT_..." | "recipe NAME" | "family default (recipe
        NAME)" | "default" | "derived: ...".
    known: what `load` has understood of the source already.
    derivation: why the numbers that follow from a budget are what they are, line by line; empty without a budget.
    told: what stands behind an option that sets much at once, in sentences.
    """

    recipe: Recipe
    origins: dict[str, str]
    machine: Machine = field(default_factory=Machine)
    known: Identity | None = field(default=None, repr=False, compare=False)
    derivation: tuple[str, ...] = ()
    told: tuple[str, ...] = ()

    @cached_property
    def identity(self) -> Identity:
        """What the recipe's source is; all parts of the program ask here."""
        asked = Identity(self.recipe.source, self.recipe.base, self.machine.offline)
        return self.known if self.known == asked else asked


def load(
    name_or_path: str,
    *,
    flags: Mapping[str, object] | None = None,
    sets: Iterable[str] = (),
    env: Mapping[str, str] | None = None,
    recipe: str | None = None,
    machine: Machine | None = None,
    complete: bool = True,
) -> Resolved:
    """Resolve SOURCE (recipe name, .yaml, catalogue source, path or hub id) and every setting over it.

    Args:
        flags: dotted key -> value, from command-line options; None values are ignored.
        sets: "key=value" texts; `lora.KEY` and `adapt.phases.*.KEY` address all LoRA phases / all phases.
        env: environment; only DCGEN_CONVERT_* is read, `__` separates levels. None reads nothing.
        recipe: a recipe to use for a SOURCE that is not one.
        complete: refuse a recipe that lacks what a conversion needs, such as pictures for its phases.
    Raises:
        RecipeError: unknown key, wrong type, impossible combination, unknown autoencoder, a size that is no multiple
            of f*p.
    """
    machine = machine or Machine()
    completing = (flags or {}).get("base")
    asked = Identity(str(name_or_path), str(completing) if completing else None, machine.offline)
    chosen, replaces = sources.recipe_for(asked, recipe)
    layers = Layers()
    side = (flags or {}).get("resolution")
    chain, larger = curricula.apply(read(chosen), side)
    for label, values in chain:
        layers.add(values, f"family default (recipe {label})" if replaces and not recipe else f"recipe {label}")
    if replaces and chosen == Family.recipe:
        layers.add(sources.family_defaults(asked), "family default")
    if replaces:
        layers.add({"source": asked.name, "name": sources.short_name(asked.name)}, "argument SOURCE")
    if larger:
        layers.add({"name": curricula.named(str(layers.values.get("name")), larger)}, f"recipe {larger}")
    layers.add_environment(env or {}, ENV_PREFIX)
    layers.add_sets(sets)
    for key, value in (flags or {}).items():
        if value is not None:
            layers.add_flag(key, value)
    found, origins = _validated(layers)
    if (found.source, found.base) != (asked.name, asked.base):
        asked = replace(asked, name=found.source, base=found.base)
        sources.require_source(asked)
    told = _told(found, side, larger, chosen, curricula.largest(chain))
    resolved = Resolved(found, origins, machine, asked, told=told)
    if complete:
        require_pictures(found, resolved.identity)
    geometry.check(found, resolved.identity)
    return replace(resolved, told=told + _guided_twice(found, resolved.identity))


def _told(recipe: Recipe, side: object, larger: str | None, chosen: str, written: int) -> tuple[str, ...]:
    """What stands behind --resolution, which sets much at once.

    Args:
        side: what it is set to; larger: the recipe that it brought in.
        chosen: the recipe that was asked for; written: px of its largest phase.
    """
    sides = [f"{phase.resolution} px" for phase in recipe.adapt.phases]
    if larger is not None:
        return (f"--resolution {side} takes the settings of the recipe {larger}: phases at {', then '.join(sides)}.",)
    if len(sides) < 2 or not isinstance(side, int) or side <= written:
        return ()
    return (
        f"--resolution {side}: the recipe {chosen} has no curriculum for it. Only its last phase is trained at "
        f"{sides[-1]}, after {' and '.join(dict.fromkeys(sides[:-1]))}.",
    )


def _guided_twice(recipe: Recipe, source: Identity) -> tuple[str, ...]:
    """That the converted model draws with guidance what it has learned from pictures that show guidance already."""
    with suppress(AccessError):
        drawn, shown = recipe.data_of(recipe.set_of(len(recipe.adapt.phases))), recipe.bundle.guidance
        if source.family.guidance == "cfg" and drawn.kind == "synthetic" and 1 < drawn.guidance <= shown:
            return (
                f"The base draws the pictures with guidance {drawn.guidance:g}, and bundle.guidance is {shown:g}: the "
                "converted model shows guidance twice. In trials 1 to 1.5 was best: --set bundle.guidance=1.5",
            )
    return ()


def require_pictures(recipe: Recipe, source: Identity) -> None:
    """RecipeError that names the phases which train on a folder of pictures, where none is given."""
    empty = [number for number in recipe.sets if _is_empty(recipe.data_of(number))]
    if not empty:
        return
    phases = [pair for pair in enumerate(recipe.adapt.phases, 1) if recipe.set_of(pair[0]) in empty]
    named = [f"adapt.phases.{number - 1} ({phase.resolution} px)" for number, phase in phases]
    key = "data" if recipe.data.kind == "folder" else f"adapt.phases.{empty[0] - 1}.data"
    option = "--data FOLDER" if key == "data" else f"--set {key}.path=FOLDER"
    with suppress(AccessError):
        if found := drawable.beyond(source.here, max(phase.resolution for _, phase in phases)):
            option += f"; {found.cannot}"
    raise RecipeError(
        f"{key}.kind is folder but {key}.path is empty: {' and '.join(named)} need{'s' * (len(named) == 1)} pictures "
        "of your own",
        f"give {option}",
    )


def _is_empty(data: Data) -> bool:
    return data.kind == "folder" and not data.path


def revive(values: Mapping[str, object], origin: str) -> Recipe:
    """The recipe that ``model_dump`` gave ``values``; RecipeError names the key that does not fit, and ``origin``."""
    layers = Layers()
    layers.add(values, origin)
    return _validated(layers)[0]


def _validated(layers: Layers) -> tuple[Recipe, dict[str, str]]:
    try:
        recipe = Recipe.model_validate(layers.values)
    except ValidationError as exc:
        raise RecipeError(one_sentence(exc, layers), "dcgen-convert recipes show NAME prints every key") from exc
    return recipe, layers.origins_of(recipe)
