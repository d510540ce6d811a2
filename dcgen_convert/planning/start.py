"""What it takes to begin LoRA along the gradient of the loss (`train.gradient_start`): batches, passes, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcgen_convert.planning.arithmetic import lora_parameters
from dcgen_convert.planning.layers import Layer
from dcgen_convert.planning.memory import GIB
from dcgen_convert.planning.shapes import Shapes
from dcgen_convert.recipe.schema import Phase, Recipe

BATCHES = 4  # that the mean gradient is taken over
PICTURES = 64  # in one of them, at most
GROUP = 4 * GIB  # bytes of the gradients that are summed at a time, in float32
NUMBER = 4  # bytes of a float32


def groups(numbers: Mapping[str, int], limit: float = GROUP) -> list[list[str]]:
    """The layers in the parts whose gradients are summed at a time, in order; each part runs all batches once.

    Args:
        numbers: layer -> numbers in its weight.
        limit: bytes of a part; a layer that is larger is a part of its own.
    """
    parts: list[list[str]] = []
    held = 0.0
    for name, count in numbers.items():
        if not parts or held + NUMBER * count > limit:
            parts.append([])
            held = 0.0
        parts[-1].append(name)
        held += NUMBER * count
    return parts


def group_bytes(layers: Sequence[Layer]) -> float:
    """Bytes of the largest part."""
    numbers = {layer.name: layer.weights for layer in layers}
    return max((NUMBER * float(sum(numbers[name] for name in part)) for part in groups(numbers)), default=0.0)


def frozen_numbers(recipe: Recipe, phase: Phase, sizes: Shapes) -> int:
    """Numbers of the frozen LoRA that a phase has beside the one that trains; 0 where LoRA begins at zero."""
    begins = recipe.starts_along_gradient(1) and phase.rank and phase == recipe.adapt.phases[0]
    return lora_parameters(sizes.lora_layers(phase), phase.rank) if begins else 0


def samples(recipe: Recipe, sizes: Shapes, world: int) -> int:
    """Pictures that run forward and backward before the first step."""
    if not recipe.starts_along_gradient(1):
        return 0
    numbers = {layer.name: layer.weights for layer in sizes.lora_layers(recipe.adapt.phases[0])}
    return BATCHES * len(groups(numbers)) * start_phase(recipe, world).batch


def start_phase(recipe: Recipe, world: int) -> Phase:
    """The measurement of the gradients, written as a phase: only embedder and head are trained, and at rate 0.

    As in the training of the head, the gradient passes through all blocks. A batch has PICTURES pictures, or the few
    more that ``world`` ranks can share evenly; never more than a batch of the training.
    """
    first = recipe.adapt.phases[0]
    batch = min(first.batch, -(-PICTURES // world) * world)
    return first.model_copy(update={"mode": "lora", "rank": 0, "batch": batch})
