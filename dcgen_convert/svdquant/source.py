"""What a model folder of diffusers holds: its config, and where its tensors lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dcgen_convert.checkpoint.headers import Entry, read_weights
from dcgen_convert.checkpoint.tensors import TORCH
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object

NAMES = {getattr(torch, known): name for name, known in TORCH.items()}
"""dtype of torch -> its name in a safetensors file."""


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """(config, tensor name -> entry) of a diffusers model folder, sharded or not.

    Errors: InputError when config.json, the weights, or a shard that the index names is missing.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(
            f"{folder} holds no config.json.", hint="Give the transformer folder of a diffusers checkpoint."
        )
    return read_object(config), read_weights(folder)
