"""Parameters and FLOPs of a structure.

N is the number of image tokens, L the number of text tokens, D the width. A multiply-add counts as 2 FLOPs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dcgen_convert.planning.layers import Layer, Structure


@dataclass(frozen=True)
class Trainable:
    """Parameters that a phase trains (T) and freezes (F), and the linears that carry LoRA."""

    trained: int
    frozen: int
    linears: int


def matching(structure: Structure, targets: str) -> list[Layer]:
    """Layers whose full name matches the regex, as PEFT matches `target_modules`."""
    pattern = re.compile(targets)
    return [layer for layer in structure.layers if pattern.fullmatch(layer.name)]


def lora_parameters(layers: list[Layer], rank: int) -> int:
    """r (in + out) for each linear."""
    return sum(rank * (layer.inputs + layer.outputs) for layer in layers)


def trainable(structure: Structure, mode: str, rank: int, targets: str, modules: tuple[str, ...]) -> Trainable:
    """What a phase trains: everything (mode "full"), or LoRA on `targets` and every parameter of `modules`."""
    if mode == "full":
        return Trainable(structure.parameters, 0, 0)
    adapted = matching(structure, targets)
    whole = sum(layer.weights + layer.bias for layer in structure.layers if layer.name in modules)
    return Trainable(lora_parameters(adapted, rank) + whole, structure.parameters - whole, len(adapted))


def forward_flops(structure: Structure, image_tokens: int, text_tokens: int) -> float:
    """FLOPs of one forward for one picture.

    Linears: 2 in out per token that they run on. Softmax attention over S tokens, the image's or all: 4 S^2 D (scores
    and values). Cross-attention: 4 N L D. Linear attention with head width h: 4 N D h (state and read-out).
    """
    n, text = image_tokens, text_tokens
    runs = {"image": n, "text": text, "both": n + text, "once": 1}
    total = sum(2.0 * layer.weights * layer.token_fraction * runs[layer.runs] for layer in structure.layers)
    total += structure.quadratic * 4.0 * (n + text) ** 2 * structure.width if structure.quadratic else 0.0
    total += structure.alone * 4.0 * n**2 * structure.width
    total += structure.cross * 4.0 * n * text * structure.width
    total += structure.linear * 4.0 * n * structure.width * structure.head_dim
    return total


def side_passes(adapt: Any, consistency: float = 0.0) -> int:
    """Number of forward passes without gradient per training sample.

    The corrected loss has one, for the null prompt. Consistency distillation has two, of the teacher and of the target.
    """
    return 2 if consistency else int(adapt.objective == "guidance-corrected")


def train_flops(forward: float, *, full: bool, checkpointing: bool, passes: int) -> float:
    """FLOPs of one training sample.

    Forward 1, gradients of activations 1, of weights 1 more when every weight trains (LoRA's own are below 10 %),
    recomputation 1 with checkpointing, and ``passes`` (`side_passes`).
    """
    return forward * (2 + full + checkpointing + passes)
