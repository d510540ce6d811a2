"""Loading a network from a diffusers folder, with errors that say what is wrong with the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dcgen_convert.checkpoint import trust
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.families.base import Network
from dcgen_convert.families.grid import LTX


def class_of(folder: Path) -> Any:
    """The class that ``folder``/config.json names: of diffusers, or this program's own.

    Raises:
        InputError: there is no such class.
    """
    path = Path(folder) / "config.json"
    name = str(read_json(path).get("_class_name"))
    found = class_called(name)
    if not isinstance(found, type):
        raise InputError(f"{path} names {name}, which is no class of diffusers")
    return found


def class_called(name: str) -> Any:
    """The class of diffusers, or this program's own, with this name; None where there is none.

    The in-bundle adapter is an AutoencoderDC with the same tensors.
    """
    import diffusers

    from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo
    from dcgen_convert.networks.autoencoder_ltx2 import AutoencoderLTX2ForWan

    own = {
        trust.VIDEO_CLASS: AutoencoderDCVideo,
        trust.LTX_CLASS: AutoencoderLTX2ForWan,
        trust.ADAPTER_CLASS: diffusers.AutoencoderDC,
    }
    return own.get(name) or getattr(diffusers, name, None)


def bundled(name: str) -> Any:
    """The class that bundles of videos have for an autoencoder of the class ``name``: one that pipelines can read."""
    return class_called(trust.LTX_CLASS if name in LTX else trust.VIDEO_CLASS)


def load_folder(folder: Path, what: str, dtype: torch.dtype) -> Network:
    """The network in ``folder``, of the class that its config.json names.

    Args:
        what: kind of network for the messages, such as "transformer".

    Raises:
        InputError: the weights do not load, some that the config asks for are missing or have another shape, or there
            are more than it asks for.
    """
    cls = class_of(folder)
    try:
        model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, use_safetensors=True)
    except (ValueError, RuntimeError, OSError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"the {what} {folder} does not load: {first[:200]}", f"dcgen-convert inspect {folder}"
        ) from error
    problems = [*info["missing_keys"], *(str(entry) for entry in info["mismatched_keys"])]
    if problems:
        raise InputError(f"the {what} {folder} lacks weights that its config asks for: {', '.join(problems[:3])}")
    if surplus := sorted(info["unexpected_keys"]):
        raise InputError(
            f"the {what} {folder} has weights that its config does not ask for: {', '.join(surplus[:3])}",
            "is the config the right one?",
        )
    return model
