"""What a single-file checkpoint is, from its tensor names and shapes alone (diffusers' and the original key names).
First rule that hits
wins."""

from __future__ import annotations

from collections.abc import Iterable

from dcgen_convert import families


def recognise_keys(names: Iterable[str]) -> tuple[str | None, str | None]:
    """(family, layout) from tensor names; the first family that finds all its names wins. (None, None) when none
    does.
    """
    keys = list(names)
    for family in families.FAMILIES.values():
        for layout, wanted in family.layouts.items():
            if all(any(key.startswith(want) for key in keys) for want in wanted):
                return family.name, layout
    return None, None
