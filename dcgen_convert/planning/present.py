"""How many pictures the user's folders hold, and what comes with them: a plan prices these, not what the recipe would
take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcgen_convert.families import Family
from dcgen_convert.recipe import geometry
from dcgen_convert.recipe.drawable import draws_edits
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.schema import Data, Recipe

if TYPE_CHECKING:
    from dcgen_convert.data.sieve import Sieve


def sieve_of(recipe: Recipe, number: int, frames: int, fps: float) -> Sieve:
    """What leaves pictures out of set ``number`` that are smaller than they are used at.

    Args:
        frames: of a training video; 0: they are pictures. fps: frames a second of the videos that the model draws.
    """
    from dcgen_convert.data import sieve  # it needs an imaging library

    data = recipe.data_of(number)
    side = data.min_side or recipe.sides(number)[-1]
    needed = sieve.area(side) if data.buckets else sieve.square(side)
    return sieve.Sieve(side, f"{recipe.data_key(number)}.min_side", needed, frames, fps)


def counted(recipe: Recipe, source: Identity) -> tuple[Recipe, list[str]]:
    """The recipe with the pictures that are there, where a folder holds fewer than it asks for; and a line on each.

    Pictures that come from the hub are not known yet. They count as the recipe says.

    Raises:
        InputError: a source of pictures is damaged.
    """
    told, frames = [], geometry.training_frames(recipe, source)
    noun = "videos" if frames else "pictures"
    for number in recipe.sets:
        data, key = recipe.data_of(number), f"{recipe.data_key(number)}.count"
        if data.kind != "folder":
            continue
        from dcgen_convert.data import given  # it needs an imaging library

        sieve = sieve_of(recipe, number, frames, source.fps)
        found = given.held(given.parse_all(data.paths, frames), data.count, sieve)
        if not found or found >= data.count:
            continue
        told.append(
            f"{', '.join(data.paths)}: {found:,} {noun} can be used{sieve.told}; {key} is {data.count:,}, and "
            f"{found:,} are priced"
        )
        recipe = _with_count(recipe, number, found)
    return recipe, told


def most_references(recipe: Recipe, family: Family) -> int:
    """Most references that a row has in any set of pictures; those on the hub are not known yet."""
    return max(_references(recipe.data_of(number), family) for number in recipe.sets)


def _references(data: Data, family: Family) -> int:
    fewest, most = family.fewest_references, family.references
    if data.kind != "folder":
        return int(draws_edits(data, family))  # each of one picture
    if fewest == most:
        return most
    from dcgen_convert.data import given

    return max(fewest, min(most, given.most_references(given.parse_all(data.paths))))


def _with_count(recipe: Recipe, number: int, count: int) -> Recipe:
    """The recipe with ``count`` pictures in set ``number``."""
    if not number:
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"count": count})})
    phases = [*recipe.adapt.phases]
    phase = phases[number - 1]
    assert phase.data is not None  # a set with a number is the data of a phase
    phases[number - 1] = phase.model_copy(update={"data": phase.data.model_copy(update={"count": count})})
    return recipe.model_copy(update={"adapt": recipe.adapt.model_copy(update={"phases": tuple(phases)})})
