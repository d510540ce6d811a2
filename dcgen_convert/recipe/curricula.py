"""The curriculum of a recipe for pictures that are larger than its own.

A recipe file may have a table `larger`: {2048: NAME, 4096: NAME}. With --resolution at one of these sizes or above it,
the settings of the recipe NAME are laid over those of the file that has the table. What extends this file, and what the
user sets, still wins. The source and the name of the recipe stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcgen_convert.core.errors import RecipeError
from dcgen_convert.recipe import shelf

TABLE = "larger"
KEPT = ("source", "base", "name", TABLE)  # of the recipe that is made larger
Chain = list[tuple[str, dict[str, Any]]]


def apply(chain: Chain, side: object) -> tuple[Chain, str | None]:
    """The chain without its tables, with the settings for pictures of ``side`` px; and the recipe they come from.

    Args:
        chain: [(recipe, settings as written), ...], weakest first, as `shelf.read` gives it.
        side: value of --resolution, if there is one.
    Raises:
        RecipeError: a table that is none, or an unknown recipe in it.
    """
    table: Mapping[Any, Any] = {}
    place = 0
    for number, (label, values) in enumerate(chain, 1):
        if TABLE in values:
            place, table = number, _table(label, values[TABLE])
    plain = [(label, _without(values, (TABLE,))) for label, values in chain]
    sizes = [px for px in table if isinstance(side, int) and px <= side]
    if not sizes:
        return plain, None
    name, there = table[max(sizes)], {label for label, _ in chain}
    more = [(label, _without(values, KEPT)) for label, values in shelf.read(name) if label not in there]
    return [*plain[:place], *more, *plain[place:]], name if more else None


def named(name: str, larger: str) -> str:
    """What a recipe is called with the curriculum of ``larger``: flux-dev and flux-krea-4k give flux-dev-4k."""
    return f"{name}-{larger.rpartition('-')[2]}"


def largest(chain: Chain) -> int:
    """px of the largest phase that the recipes write; 0: they write none."""
    for _, values in reversed(chain):
        section = values.get("adapt")
        if isinstance(section, dict) and isinstance(section.get("phases"), list):
            sides = [phase.get("resolution") for phase in section["phases"] if isinstance(phase, dict)]
            return max((px for px in sides if isinstance(px, int)), default=0)
    return 0


def _table(label: str, value: object) -> Mapping[Any, Any]:
    fits = isinstance(value, dict) and all(type(px) is int and isinstance(name, str) for px, name in value.items())
    if not isinstance(value, dict) or not fits:
        raise RecipeError(
            f"{TABLE} of {label} is no table of sizes in px and recipes", f"for example {TABLE}: {{2048: flux-krea-2k}}"
        )
    return value


def _without(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
