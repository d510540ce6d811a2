"""Edits of the tiny world: a scene, an instruction, and the scene in which one attribute is another.

An instruction names the new value of one attribute, in the words of the captions:

    make the circle blue
    move the circle to the top left
    put the circle under water

Where it names the shape too, it is the shape of the source. So all that an instruction names holds in the edited scene.
Source and edited picture have the same jitter: they differ in the attribute alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from dcgen_convert.tiny import world

COLUMNS = tuple(world.ATTRIBUTES)
OTHER = 500_000_003  # added to the seed: equal numbers would tie an attribute of the scene to what is changed
FORMS = {
    "shape": "make it a {value}",
    "color": "make the {shape} {value}",
    "scene": "put the {shape} {value}",
    "place": "move the {shape} to {value}",
    "size": "make the {shape} {value}",
    "texture": "make the {shape} {value}",
}


@dataclass(frozen=True)
class Edits:
    """B edits.

    Attributes:
        before: attribute indices of the source scenes, (B, 6) int64.
        after: the same of the edited scenes; each row differs from that of ``before`` in one column.
        column: which one, (B,) int64.
    """

    before: Tensor
    after: Tensor
    column: Tensor

    @property
    def instructions(self) -> list[str]:
        rows = zip(self.after.tolist(), self.column.tolist(), strict=True)
        return [instruction(labels, column) for labels, column in rows]

    @property
    def undone(self) -> Edits:
        """The edits that lead back."""
        return Edits(self.after, self.before, self.column)


def draw(edits: Edits, seed: int, side: int = world.SIDE) -> tuple[Tensor, Tensor]:
    """Source and edited pictures, each (B, 3, side, side) in [-1, 1]. The seed is that of their common jitter."""
    return world.draw(edits.before, seed, side), world.draw(edits.after, seed, side)


def sample(count: int, seed: int) -> Edits:
    """``count`` edits of uniformly drawn scenes: every attribute is as frequent, and every other value of it."""
    before = world.sample_labels(count, seed)
    generator = torch.Generator().manual_seed(seed + OTHER)
    column = torch.randint(len(COLUMNS), (count,), generator=generator)
    values = torch.tensor([len(names) for names in world.ATTRIBUTES.values()])[column]
    step = 1 + (torch.rand(count, generator=generator) * (values - 1)).long()
    after = before.clone()
    rows = torch.arange(count)
    after[rows, column] = (before[rows, column] + step) % values
    return Edits(before, after, column)


def instruction(after: Sequence[int], column: int) -> str:
    """What to say so that attribute ``column`` becomes what it is in ``after``, the attribute indices of a scene."""
    name = COLUMNS[column]
    value = world.ATTRIBUTES[name][int(after[column])]
    if name == "place":  # "at the top left" -> "the top left"
        value = value.split(maxsplit=1)[1]
    return FORMS[name].format(shape=world.SHAPES[int(after[0])], value=value)


def parse(text: str) -> tuple[int, int] | None:
    """Column and new value of the attribute that an instruction changes; None where the tiny world does not know it."""
    return _known().get(text)


@cache
def _known() -> Mapping[str, tuple[int, int]]:
    """All instructions there are, with what each changes."""
    found = {}
    for column, names in enumerate(world.ATTRIBUTES.values()):
        for shape, value in product(range(len(world.SHAPES)), range(len(names))):
            after = [shape, 0, 0, 0, 0, 0]
            after[column] = value
            found[instruction(after, column)] = column, value
    return found
