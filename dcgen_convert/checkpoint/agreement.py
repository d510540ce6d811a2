"""Whether a network's config and its weights belong together: the class is built without memory, and its tensors are
compared with those of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint.keymap import LISTED, Shape
from dcgen_convert.core.errors import InputError


def require_possible(config: Mapping[str, Any], tensors: Mapping[str, object], where: Path) -> None:
    """InputError for a config of more blocks than there are tensors: its class would be built for ever."""
    for key, value in config.items():
        if ("layers" in key or "blocks" in key) and isinstance(value, int) and value > len(tensors):
            raise InputError(
                f"{where}: {key} is {value} where {len(tensors)} tensors are", "is the config the right one?"
            )


def require_agreement(
    config: Mapping[str, Any], shapes: Mapping[str, Shape], model_class: str, where: Path, doubt: str, hint: str
) -> None:
    """InputError unless the tensors of ``shapes`` are exactly those that ``config`` asks for.

    Args:
        model_class: diffusers class of the network.
        where: what holds the tensors.
        doubt: what the user can do about tensors that differ; ``hint``: about a config that cannot be.
    """
    import diffusers
    import torch

    require_possible(config, shapes, where)
    try:
        with torch.device("meta"):
            model = getattr(diffusers, model_class).from_config(config)
    except Exception as error:  # the class trusts its config: whatever it stumbles over is a config that cannot be
        first = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            f"the config of {where} describes no {model_class}: {type(error).__name__}: {first}", hint
        ) from error
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for what, names in (("lacks", wanted.keys() - shapes.keys()), ("has too many:", shapes.keys() - wanted.keys())):
        if listed := sorted(names):
            raise InputError(
                f"{where} {what} {len(listed)} tensors for a {model_class} of its sizes: {some(listed)}", doubt
            )
    odd = next((name for name, shape in wanted.items() if tuple(shapes[name]) != shape), None)
    if odd:
        raise InputError(f"{odd} is {list(shapes[odd])} in {where}, its config asks for {list(wanted[odd])}", doubt)


def some(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return ", ".join(listed[:LISTED]) + more
