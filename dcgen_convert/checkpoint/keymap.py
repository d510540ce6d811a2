"""Translates original tensor names to diffusers' names and back, with the tables of `key_tables`; needs no weights.

A `Cut` is the rows [start, stop) of one tensor. Every tensor of one layout is a stack of cuts of the other layout. So a
file can be rewritten by copying byte ranges, and a LoRA on a fused linear is split at the same rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from dcgen_convert.checkpoint.key_tables import TABLES
from dcgen_convert.core.errors import InputError

Shape = tuple[int, ...]
LEAVES = ("weight", "bias")
LISTED = 6  # names that an error shows


@dataclass(frozen=True)
class Cut:
    """Rows [start, stop) of the tensor called ``name``."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Stack:
    """A tensor of ``shape`` made of cuts, one below the other."""

    shape: Shape
    cuts: tuple[Cut, ...]


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    right: names with their row counts; None: an equal part of the rows that are left, "D": the model's width.
    """

    left: str
    right: tuple[tuple[str, str | None], ...]
    swapped: bool = False
    shape: Shape | None = None


class KeyMap:
    """One table, read in both directions."""

    def __init__(self, table: str, width: str) -> None:
        self.width = width
        rules = list(_rules(table))
        self._left = {rule.left: rule for rule in rules}
        self._right = {name: rule for rule in rules for name, _ in rule.right}

    def forward(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, Stack], list[str]]:
        """Original names and shapes -> (diffusers names as stacks of original tensors, names of unused tensors).

        Raises:
            InputError: names that the table does not know (they are listed), or rows that do not divide.
        """
        found: dict[str, Stack] = {}
        unused: list[str] = []
        unknown: list[str] = []
        for name, shape, rule, number in self._matched(self._left, shapes, unknown):
            if not rule.right:
                unused.append(name)
                continue
            rows = shape[0] if shape else 1
            start = 0
            for (pattern, _), size in zip(rule.right, self._sizes(rule, rows, shapes, name), strict=True):
                target = _fill(pattern, number)
                if target in found:
                    raise InputError(
                        f"{name} and another tensor both become {target}", "is the file two checkpoints in one?"
                    )
                cuts = _halves(name, rows) if rule.swapped else (Cut(name, start, start + size),)
                found[target] = Stack(_reshaped(rule, (size, *shape[1:]) if shape else shape, name), cuts)
                start += size
        _complain(unknown, "in the original layout")
        return found, unused

    def backward(self, shapes: Mapping[str, Shape]) -> dict[str, Stack]:
        """Diffusers names and shapes -> original names as stacks of diffusers tensors.

        Raises:
            InputError: names that the table does not know, or a fused tensor of which a part is missing.
        """
        unknown: list[str] = []
        found: dict[str, Stack] = {}
        for name, shape, rule, number in self._matched(self._right, shapes, unknown):
            left = _fill(rule.left, number)
            if left in found:
                continue
            parts = [_fill(pattern, number) for pattern, _ in rule.right]
            missing = [part for part in parts if part not in shapes]
            if missing:
                raise InputError(
                    f"{left} needs {missing[0]}, which the checkpoint lacks", "is the checkpoint complete?"
                )
            sizes = [shapes[part][0] if shapes[part] else 1 for part in parts]
            cuts = tuple(Cut(part, 0, size) for part, size in zip(parts, sizes, strict=True))
            rows = (math.prod(shape),) if rule.shape else (sum(sizes), *shape[1:]) if shape else shape
            found[left] = Stack(rows, _halves(name, sizes[0]) if rule.swapped else cuts)
        _complain(unknown, "in diffusers' layout")
        return found

    def _matched(self, rules: dict[str, Rule], shapes: Mapping[str, Shape], unknown: list[str]) -> Iterator[tuple]:
        """(name, shape, rule, block number) of every name that has a rule; the others go to ``unknown``."""
        highest: dict[str, int] = {}
        split = {name: _numbered(name) for name in shapes}
        for head, number, _ in split.values():
            highest[head] = max(highest.get(head, 0), number)
        for name, shape in shapes.items():
            head, number, tail = split[name]
            last = f"{head}.${tail}" if number == highest[head] else ""
            pattern = next((key for key in (name, last, f"{head}.#{tail}") if key in rules), None)
            if pattern is None:
                unknown.append(name)
            else:
                yield name, shape, rules[pattern], number

    def _sizes(self, rule: Rule, rows: int, shapes: Mapping[str, Shape], name: str) -> list[int]:
        known: list[int | None] = [None] * len(rule.right)
        if any(size == "D" for _, size in rule.right):
            if not shapes.get(self.width):
                raise InputError(f"the checkpoint lacks {self.width}, whose rows split {name}", "is it complete?")
            known = [shapes[self.width][0] if size == "D" else None for _, size in rule.right]
        open_ = known.count(None)
        left = rows - sum(size for size in known if size)
        each = left // open_ if open_ else 0
        if left < 0 or each * open_ != left or (left == 0) != (open_ == 0) or (rule.swapped and rows % 2):
            parts = ", ".join(pattern.rpartition(".")[0] for pattern, _ in rule.right)
            raise InputError(f"{name} has {rows} rows, which do not divide into {parts}", "is the checkpoint damaged?")
        return [each if size is None else size for size in known]


@cache
def find(family: str, layout: str) -> KeyMap | None:
    """The key map of a family's layout; None if there is none, as for diffusers' own names."""
    return KeyMap(*TABLES[family, layout]) if (family, layout) in TABLES else None


def _rules(table: str) -> Iterator[Rule]:
    for line in filter(None, map(str.strip, table.splitlines())):
        for text in _expanded(line):
            parts = re.fullmatch(r"(\S+)(?: ([=~-])(?: (\S+)(?: \((-?\d+), (-?\d+)\))?)?)?", text)
            assert parts is not None, f"a key map has the line {text!r}"
            left, sign, right, rows, columns = parts.groups()
            names = () if sign == "-" else tuple(_summed(right or left))
            shape = (int(rows), int(columns)) if rows else None
            for leaf in LEAVES if left.endswith(".*") else (None,):
                named = tuple((_leaf(name, leaf), size) for name, size in names)
                yield Rule(_leaf(left, leaf), named, sign == "~", shape)


def _expanded(line: str) -> Iterator[str]:
    """Lines for every choice of `{a,b}`."""
    choice = re.search(r"\{([^{}+]*,[^{}+]*)\}", line)
    if choice is None:
        yield line
        return
    for option in choice[1].split(","):
        yield from _expanded(line.replace(choice[0], option))


def _summed(right: str) -> Iterator[tuple[str, str | None]]:
    """The names in `A.{b:D+c}.E`, with their row counts."""
    fused = re.search(r"\{([^{}]*)\}", right)
    if fused is None:
        yield right, None
        return
    for part in fused[1].split("+"):
        name, _, size = part.partition(":")
        yield right.replace(fused[0], name), size or None


def _leaf(name: str, leaf: str | None) -> str:
    return name if leaf is None else f"{name.removesuffix('*')}{leaf}"


def _numbered(name: str) -> tuple[str, int, str]:
    """("blocks", 3, ".attn.weight") of "blocks.3.attn.weight"; number -1 when there is none."""
    match = re.match(r"(.*?)\.(\d{1,6})(\..*)", name)
    return (match[1], int(match[2]), match[3]) if match else (name, -1, "")


def _fill(pattern: str, number: int) -> str:
    return pattern.replace("#", str(number)).replace("$", str(number))


def _halves(name: str, rows: int) -> tuple[Cut, Cut]:
    return Cut(name, rows // 2, rows), Cut(name, 0, rows // 2)


def _reshaped(rule: Rule, shape: Shape, name: str) -> Shape:
    if rule.shape is None:
        return shape
    rows, count = rule.shape[0], math.prod(shape)
    if count % rows:
        raise InputError(f"{name} has {count} numbers, no multiple of {rows}", "is the checkpoint damaged?")
    return rows, count // rows


def _complain(unknown: list[str], where: str) -> None:
    if unknown:
        more = f" and {len(unknown) - LISTED} more" if len(unknown) > LISTED else ""
        raise InputError(
            f"{len(unknown)} tensors have no place {where}: {', '.join(unknown[:LISTED])}{more}",
            "a LoRA, a ControlNet or another model beside the transformer must be taken out of the file first",
        )
