"""Loading a transformer folder, and replacing its embedder and head by those of the conversion."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.names import TRANSFORMER as TRANSFORMER
from dcgen_convert.families import Family
from dcgen_convert.families.base import Network
from dcgen_convert.networks.folder import load_folder
from dcgen_convert.networks.wide import widen

VARIANTS = 64  # of a compiled block


def load(folder: Path, dtype: torch.dtype, modules: Path | None = None, device: str = "cpu") -> Network:
    """The diffusers transformer in ``folder``, frozen, in eval mode.

    Training uses eval mode too. In these models training mode changes only the label dropout of DiT, which drops labels
    in each block separately. The training objective drops the text instead.

    Args:
        modules: safetensors file; its tensors replace those of the folder.

    Raises:
        InputError: weights are missing or do not have the shapes that the config asks for.
    """
    model = load_folder(folder, TRANSFORMER, dtype)
    if modules:
        load_modules(model, modules)
    model = model.eval().requires_grad_(False).to(device)
    widen(model)
    return model


def compile_blocks(family: Family, model: Network) -> None:
    """Let torch compile each block of the network when it first runs; equal blocks share the compiled code.

    Names and weights stay as they are. Results differ from those without by the order of float sums.
    """
    # Torch gives up compiling after 8 variants of a block, without an error. There are more: with and without
    # gradients, with the adapter on and off, batches of several sizes.
    torch._dynamo.config.recompile_limit = VARIANTS  # noqa: SLF001  its documented name
    for block in family.block_modules(model):
        block.compile()


def load_modules(model: nn.Module, path: Path) -> None:
    """Overwrite the model's tensors with those in ``path``; InputError for a tensor that does not fit the model."""
    state = dict(model.named_parameters())
    for name, value in load_file(path).items():
        if name not in state or state[name].shape != value.shape:
            raise InputError(f"{path} holds {name} {tuple(value.shape)}, which does not fit the model")
        state[name].data.copy_(value)
