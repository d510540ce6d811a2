"""A transformer by itself, in one file or one folder: its family and layout, and its tensors under diffusers' names.

Headers only; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dcgen_convert import families
from dcgen_convert.checkpoint import keymap
from dcgen_convert.checkpoint.held import Change, Contents, Held, item_of, read_contents
from dcgen_convert.checkpoint.keymap import Cut, Stack
from dcgen_convert.checkpoint.sizes import SIZES, config_of
from dcgen_convert.checkpoint.stream import Item
from dcgen_convert.core.errors import InputError
from dcgen_convert.families import Family, bases
from dcgen_convert.families.keys import recognise_keys


@dataclass(frozen=True)
class Single:
    """A transformer's tensors.

    layout: whose names the file uses. stacks: diffusers name -> rows of the file's tensors. unused: tensors of the file
    that the network does not use.
    """

    contents: Contents
    family: Family
    layout: str
    stacks: dict[str, Stack]
    unused: list[str]

    @property
    def path(self) -> Path:
        return self.contents.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Under diffusers' names."""
        return {name: stack.shape for name, stack in self.stacks.items()}

    def config(self, template: Mapping[str, object] | None = None) -> dict:
        """The transformer's config; ``template`` says what shapes do not, by default what ships for the family.

        Raises:
            InputError: neither shapes nor a template tell the sizes of this family.
        """
        template = bases.template_of(self.family.name) if template is None else template
        if not template and self.family.name not in SIZES:
            raise InputError(
                f"{self.path} is a {self.family.name} transformer, whose sizes its tensors do not tell",
                "name the pipeline folder that it belongs to: --base FOLDER",
            )
        try:
            return config_of(self.family, self.shapes, template)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f"the transformer config that completes {self.path} is damaged: {type(error).__name__}: {error}",
                "name another pipeline folder: --base FOLDER",
            ) from error

    def item(self, name: str, update: Change | None = None) -> Item:
        """What to write for the tensor of that diffusers name; ``update`` changes its rows."""
        stack = self.stacks[name]
        parts = [(self.contents.tensors[cut.name], cut.start, cut.stop) for cut in stack.cuts]
        return item_of(name, stack.shape, parts, update)

    def dtype(self, name: str) -> str:
        return self.contents.tensors[self.stacks[name].cuts[0].name].dtype


def read_single(path: Path) -> Single:
    """The transformer in ``path``, recognised by its tensor names.

    Raises:
        InputError: no family's names, a layout without a key map, names that the map does not know, packed weights.
    """
    contents = read_contents(path)
    name, layout = recognise_keys(contents.tensors)
    if name is None or layout is None:
        raise InputError(f"{path} is no transformer of a supported family", f"dcgen-convert inspect {path}")
    stacks, unused = mapped(contents.tensors, name, layout, path)
    return Single(contents, families.get(name), layout, stacks, unused)


def mapped(tensors: Mapping[str, Held], family: str, layout: str, path: Path) -> tuple[dict[str, Stack], list[str]]:
    """(tensors under diffusers' names, unused tensors)."""
    shapes = {name: held.shape for name, held in tensors.items()}
    if layout == "diffusers":
        unused = [name for name in shapes if name in families.get(family).unused]
        stacks = {name: Stack(shape, (Cut(name, 0, tensors[name].rows),)) for name, shape in shapes.items()}
        return {name: stack for name, stack in stacks.items() if name not in unused}, unused
    table = keymap.find(family, layout)
    if table is None:
        raise InputError(
            f"{path} is a {family} transformer in its authors' layout, for which there is no key map",
            "give it in diffusers' layout",
        )
    return table.forward(shapes)
