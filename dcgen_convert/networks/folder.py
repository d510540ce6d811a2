"""Loading a network from a diffusers folder, with errors that say what is wrong with the folder."""

from __future__ import annotations

from pathlib import Path

import torch

from dcgen_convert.checkpoint import trust
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.families.base import Network


def load_folder(folder: Path, what: str, dtype: torch.dtype) -> Network:
    """The network in ``folder``, of the class that its config.json names.

    Args:
        what: kind of network for the messages, such as "transformer".

    Raises:
        InputError: the weights do not load, some that the config asks for are missing or have another shape, or there
            are more than it asks for.
    """
    import diffusers

    from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo

    name = read_json(Path(folder) / "config.json")["_class_name"]
    if name == trust.VIDEO_CLASS:
        cls = AutoencoderDCVideo
    else:  # the in-bundle adapter is an AutoencoderDC with the same tensors
        cls = getattr(diffusers, "AutoencoderDC" if name == trust.ADAPTER_CLASS else name)
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
