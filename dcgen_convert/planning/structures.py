"""The structure of a transformer from its config: computed for the common classes, else read from the built class."""

from __future__ import annotations

from collections.abc import Callable

from dcgen_convert import families
from dcgen_convert.core.errors import InputError
from dcgen_convert.families import Family
from dcgen_convert.planning.layers import Structure, dit, flux, sana

STRUCTURES: dict[str, Callable[[dict], Structure]] = {
    "FluxTransformer2DModel": flux,
    "SanaTransformer2DModel": sana,
    "DiTTransformer2DModel": dit,
}


def structure(config: dict, family: Family | None = None) -> Structure:
    """The structure of a transformer config; ``family``: whose it is, where more than the config tells it.

    Raises:
        InputError: an unknown class, or a config without one of its sizes.
    """
    name = config.get("_class_name")
    if name not in STRUCTURES:
        family = family or families.recognise(config)
        if family is None:
            raise InputError(f"no arithmetic for transformer class {name}", f"known: {', '.join(families.FAMILIES)}")
        from dcgen_convert.planning.modules import measured  # it needs torch

        return measured(config, family)
    try:
        return STRUCTURES[name](config)
    except KeyError as exc:
        raise InputError(
            f"the transformer config lacks {exc.args[0]}", "fetch the source's transformer/config.json again"
        ) from exc
