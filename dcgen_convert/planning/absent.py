"""What a recipe names on this machine, and what is not there."""

from __future__ import annotations

from collections.abc import Iterator

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import prompt_lists, prompts
from dcgen_convert.families import catalog
from dcgen_convert.planning.present import sieve_of
from dcgen_convert.recipe.schema import Recipe


def absent(recipe: Recipe, frames: int = 0, fps: float = 0) -> list[InputError]:
    """The errors that a conversion would stop with: pictures, prompts, a base and LoRA files that cannot be found.

    Args:
        frames: of a training video; 0: they are pictures. fps: frames a second of the videos that the model draws.
    """
    return [*{error.message: error for error in _absent(recipe, frames, fps)}.values()]


def require_here(recipe: Recipe, frames: int = 0, fps: float = 0) -> None:
    """InputError for the first thing that is not there; else as `absent`."""
    for problem in _absent(recipe, frames, fps):
        raise problem


def _absent(recipe: Recipe, frames: int, fps: float) -> Iterator[InputError]:
    for number in recipe.sets:
        try:
            _require_pictures(recipe, number, frames, fps)
        except InputError as error:
            yield error
    if recipe.base is not None and catalog.find_source(recipe.base) is None:
        from dcgen_convert.checkpoint import source  # it needs numpy

        try:
            source.folder_at(recipe.base)
        except InputError as error:
            yield error
    for text in recipe.loras:
        from dcgen_convert.checkpoint import lora  # it needs numpy

        try:
            lora.parse(text)
        except InputError as error:
            yield error


def _require_pictures(recipe: Recipe, number: int, frames: int, fps: float) -> None:
    """InputError for pictures or prompts of set ``number`` that are not here, or for pictures that are too small."""
    data = recipe.data_of(number)
    if data.kind != "folder":
        if data.prompts not in prompts.KINDS:
            prompt_lists.require_here(data.prompts)
        return
    from dcgen_convert.data import given  # it needs an imaging library

    sources = given.parse_all(data.paths, frames)
    given.require_here(sources)
    given.require_large(sources, sieve_of(recipe, number, frames, fps))
