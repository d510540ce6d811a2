"""The weights of DC-AE-V as its authors publish them: a pickle, with the names of their code.

This is the only pickle that the program reads as a model. It is read when its SHA-256 is the stated one, and then as
tensors alone: torch's restricted reader refuses everything else in it.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import sha256

if TYPE_CHECKING:
    from torch import Tensor

STAGE = re.compile(r"\.stages\.(\d+)\.op_list\.(\d+)\.main\.")
ENDS = (  # the authors' names -> ours
    (".conv2.norm.", ".norm."),
    (".project_out.op_list.0.", ".norm_out."),
    (".project_out.op_list.2.", ".conv_out."),
    (".project_in.", ".conv_in."),
    (".project_out.", ".conv_out."),
)
INNER = re.compile(r"(\.conv\w*)\.conv\.(weight|bias)$")  # each convolution of theirs holds one of torch


def translated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors under the names of AutoencoderDCVideo.

    Their stages count from 1: their stage 0 has no blocks. Source: the code that they published, dc_videogen.
    """
    return {_renamed(name): value for name, value in tensors.items()}


def _renamed(name: str) -> str:
    name = STAGE.sub(lambda found: f".stages.{int(found[1]) - 1}.{found[2]}.", name)
    for theirs, ours in ENDS:
        name = name.replace(theirs, ours)
    return INNER.sub(r"\1.\2", name)


def read_pickle(path: Path, stated: str | None) -> dict[str, Tensor]:
    """Name -> tensor of the authors' file ``path``.

    Args:
        stated: the SHA-256 that the file must have.

    Raises:
        InputError: no SHA-256 is stated, the file has another one, or it holds anything beside tensors.
    """
    import torch

    found = sha256(path)
    if found != stated:
        raise InputError(
            f"{path} has the SHA-256 {found}, and not {stated or 'a stated one'}; it was not read",
            "fetch the file again, from where its authors publish it",
        )
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{path} does not hold tensors alone: {first[:200]}", "fetch the file again") from error
    tensors = _of_model(held)
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InputError(f"{path} holds no tensors by name", "give the file of a DC-AE-V")
    return tensors


def _of_model(held: Any) -> dict[str, Any]:
    """The network's tensors, as the authors' code takes them: the average over the training where the file has one."""
    averages = held.get("ema_model_state_dict") if isinstance(held, Mapping) else None
    if isinstance(averages, Mapping) and averages:
        return dict(next(iter(averages.values())))
    return dict(held.get("model_state_dict", held)) if isinstance(held, Mapping) else {}
