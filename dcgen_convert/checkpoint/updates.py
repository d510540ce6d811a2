"""Low-rank updates of weights, and the LoRA files in diffusers format that hold them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcgen_convert.checkpoint.headers import Entry, read_header
from dcgen_convert.checkpoint.tensors import read_tensor
from dcgen_convert.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Update:
    """One low-rank update: W' = W + scale up @ down; ``down`` (r, in, ...), ``up`` (out, r, ...)."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, weight: Tensor) -> Tensor:
        """The update in float32 with the weight's shape, (out, in) or (out, in, kh, kw)."""
        down, up = self.down.float(), self.up.float()
        product = up.flatten(1) @ down.flatten(1)  # a convolution's B is 1 x 1, so this is its composition with A
        return product.mul_(self.scale).reshape(weight.shape)


@dataclass(frozen=True)
class Stored:
    """An update that lies in a file."""

    down: Entry
    up: Entry
    scale: float

    def read(self, first: int, last: int) -> Update:
        """Its part for the rows [first, last) of the weight."""
        return Update(read_tensor(self.down), read_tensor(self.up, first, last), self.scale)


def read_lora(path: Path, component: str) -> dict[str, Stored]:
    """Weight name -> update, of a LoRA file in diffusers format for a pipeline's ``component``, from its header.

    Raises:
        InputError: no rank and alpha in the metadata, a variant other than plain LoRA, or a key that is not of LoRA.
    """
    tensors, metadata = read_header(path)
    if METADATA not in metadata:
        raise InputError(
            f"{path} does not state its rank and alpha",
            hint="save it with save_lora_weights and its metadata",
        )
    config = {key.removeprefix(f"{component}."): value for key, value in json.loads(metadata[METADATA]).items()}
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise InputError(f"{path} uses {key}: only plain LoRA can be merged")
    scale = config["lora_alpha"] / config["r"]
    updates = {}
    for name in tensors:
        match = re.fullmatch(rf"{component}\.(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise InputError(f"{path}: {name} is not a LoRA weight of the {component}")
        partner = name.replace(f"lora_{match[2]}.weight", f"lora_{'B' if match[2] == 'A' else 'A'}.weight")
        if partner not in tensors:
            raise InputError(f"{path}: {name} has no partner {partner}")
        if match[2] == "A":
            updates[f"{match[1]}.weight"] = Stored(tensors[name], tensors[partner], scale)
    return updates
