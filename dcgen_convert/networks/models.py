"""Loading a transformer folder, with re-made modules laid over it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json

MODULES = "modules.safetensors"  # whole tensors of the embedder and head under the transformer's own names, float32
TRANSFORMER = "transformer"


def load(folder: Path, dtype: torch.dtype, modules: Path | None = None, device: str = "cpu") -> nn.Module:
    """The diffusers transformer in ``folder``, frozen, in eval mode.

    Training keeps eval mode too: the only thing that training mode changes in these models is DiT's label dropout,
    which drops labels block by block. Text drop is the objective's work.

    Args:
        modules: safetensors file whose tensors replace the folder's.
    Raises:
        InputError: weights missing or of other shapes than the config says.
    """
    import diffusers

    cls = getattr(diffusers, read_json(Path(folder) / "config.json")["_class_name"])
    try:
        model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, use_safetensors=True)
    except (ValueError, RuntimeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"the transformer {folder} does not load: {first[:200]}", f"dcgen-convert inspect {folder}"
        ) from error
    problems = [*info["missing_keys"], *(str(entry) for entry in info["mismatched_keys"])]
    if problems:
        raise InputError(f"the transformer {folder} lacks weights that its config asks for: {', '.join(problems[:3])}")
    if modules:
        load_modules(model, modules)
    return model.eval().requires_grad_(False).to(device)


def load_modules(model: nn.Module, path: Path) -> None:
    """Overwrite the tensors named in ``path``; InputError for one that the model lacks."""
    state = dict(model.named_parameters())
    for name, value in load_file(path).items():
        if name not in state or state[name].shape != value.shape:
            raise InputError(f"{path} holds {name} {tuple(value.shape)}, which does not fit the model")
        state[name].data.copy_(value)
