"""The family and the layout of a single-file checkpoint, from its tensor names (of diffusers or of the authors)."""

from __future__ import annotations

from collections.abc import Iterable

from dcgen_convert import families


def recognise_keys(names: Iterable[str]) -> tuple[str | None, str | None]:
    """(family, layout) of the first family whose prefixes all occur in ``names``; (None, None) when there is none."""
    keys = list(names)
    for family in families.FAMILIES.values():
        for layout, wanted in family.layouts.items():
            if all(any(key.startswith(want) for key in keys) for want in wanted):
                return family.name, layout
    return None, None
