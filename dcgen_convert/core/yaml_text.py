"""YAML as people write settings: scalars of YAML 1.2's core schema, no key twice, aliases that unfold to little.

PyYAML reads YAML 1.1, where 010 is 8, `yes` is true and 1:30 is 90. YAML 1.2 (section 10.3) reads 10, and two texts.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from dcgen_convert.core.errors import RecipeError

MOST = 100_000  # values in one document, after every alias has been replaced by what it stands for
TAG = "tag:yaml.org,2002:"
QUOTE = "quote texts that hold : or ["
NUMBERS = list("-+.0123456789")
CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", NUMBERS),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", NUMBERS),
    ("merge", r"<<", ["<"]),
)


class CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  as in the base class

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        try:
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        except ValueError as error:
            raise ConstructorError(None, None, f"{text[:40]!r} is no whole number", node.start_mark) from error


for name, pattern, first in CORE:
    CoreLoader.add_implicit_resolver(TAG + name, re.compile(rf"(?:{pattern})\Z"), first)
CoreLoader.add_constructor(f"{TAG}int", CoreLoader.construct_whole_number)


def parse(text: str, where: str) -> Any:
    """The one document in ``text``; None when it is empty.

    Args:
        where: what the text is, for messages: a file's path, or "--set KEY".
    Raises:
        RecipeError: no YAML, a key that stands twice in one mapping, or aliases that unfold to more than MOST values.
    """
    try:
        node = yaml.compose(text, CoreLoader)
        if node is None:
            return None
        _count(node, {})
        return yaml.load(text, CoreLoader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise RecipeError(f"{where}{line} is not valid YAML: {error.problem}", QUOTE) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is not valid YAML: {' '.join(str(error).split())[:200]}", QUOTE) from error


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below ``node``, with every alias counted as often as it stands; ``known`` holds those of finished nodes.

    A node that is met inside itself counts as too many.
    """
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST + 1
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node)
        total = 1 + sum(_count(part, known) for pair in node.value for part in pair)
    else:
        total = 1 + sum(_count(part, known) for part in node.value if isinstance(node, yaml.SequenceNode))
    if total > MOST:
        raise ConstructorError(None, None, f"it unfolds to more than {MOST:,} values", node.start_mark)
    known[id(node)] = total
    return total


def _refuse_twice(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != f"{TAG}merge":
            if key.value in seen:
                raise ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
