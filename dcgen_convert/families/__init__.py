"""Families of diffusion transformers, each one module of facts."""

from __future__ import annotations

from collections.abc import Iterable

from dcgen_convert.errors import InputError
from dcgen_convert.families.base import Family, QuantTargets, Text
from dcgen_convert.families.dit import DiT
from dcgen_convert.families.flux import Flux
from dcgen_convert.families.sana import Sana

__all__ = ["FAMILIES", "Family", "QuantTargets", "Text", "get", "recognise"]

FAMILIES: dict[str, Family] = {family.name: family for family in (Flux(), Sana(), DiT())}


def get(name: str) -> Family:
    """The family called ``name``; InputError when there is none."""
    if name not in FAMILIES:
        raise InputError(f"no family is called {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def recognise(model_class: str | None, keys: Iterable[str] = ()) -> Family | None:
    """Family of a transformer from the ``_class_name`` of its config; None when no family claims it."""
    return next((family for family in FAMILIES.values() if family.model_class == model_class), None)
