"""The rooms of the package and their order. CONTRIBUTING.md shows the same list.

A room is a folder or a file directly inside `dcgen_convert/`. A room may import rooms of lower floors only, and itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "dcgen_convert"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

FLOORS = (  # from the top down
    ("cli",),
    ("__init__",),
    ("api",),
    ("conversion", "quantization", "judging"),
    ("stages",),
    ("train",),
    ("planning", "bundle"),
    ("recipe", "svdquant"),
    ("networks",),
    ("checkpoint",),
    ("families", "evaluation", "data", "ranks"),
    ("tiny", "core"),
)

# Arrows that may go up, each with its reason: (importing module, imported room) -> reason.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("api.command", "cli"): "starts the command as a process, for several ranks: python -m dcgen_convert.cli",
    ("ranks.launch", "cli"): "starts the ranks as processes: python -m dcgen_convert.cli",
    ("ranks.hosts", "cli"): "starts the ranks as processes: python -m dcgen_convert.cli",
}


@dataclass(frozen=True)
class Arrow:
    """One import: the module that imports, the module that it names, and the line."""

    source: str
    target: str
    line: int

    @property
    def rooms(self) -> tuple[str, str]:
        return room(self.source), room(self.target)


def room(module: str) -> str:
    """The room of a module, by its dotted name inside the package ("" is the package itself)."""
    return module.split(".")[0] or "__init__"


def floor(name: str) -> int:
    """Number of the floor of a room, 0 is the top."""
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules() -> dict[str, Path]:
    """Dotted name inside the package -> file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows() -> Iterator[Arrow]:
    """Every import inside the package: at the top, in functions, under TYPE_CHECKING, and modules named in texts."""
    known = modules()
    for name, path in known.items():
        tree = parsed(path)
        documentation = {id(node) for node in _documentation(tree)}
        for node in ast.walk(tree):
            if id(node) not in documentation:
                yield from (Arrow(name, target, node.lineno) for target in _targets(node, name, path, known))


def _targets(node: ast.AST, name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        full = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            above = package[: len(package) - node.level + 1]
            base = ".".join([PACKAGE, *above, *([node.module] if node.module else [])])
        full = [f"{base}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{PACKAGE}."):
        full = [node.value] if node.value.replace(".", "").isidentifier() else []
    else:
        return
    for text in full:
        if text == PACKAGE or text.startswith(f"{PACKAGE}."):
            inside = text[len(PACKAGE) + 1 :]
            while inside not in known:  # the last part is a name inside the module
                inside = inside.rpartition(".")[0]
            yield inside


def _documentation(tree: ast.AST) -> Iterator[ast.AST]:
    """The docstrings: a module named there is no import."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            yield first.value


def classes() -> dict[str, list[str]]:
    """Name of a class -> the modules that define one of that name."""
    found: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(module)
    return found


def circles() -> list[list[str]]:
    """Groups of modules that import one another, at the top or later."""
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for arrow in arrows():
        if arrow.source != arrow.target:
            graph[arrow.source].add(arrow.target)
    reach = {name: _reach(graph, name) for name in graph}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def _reach(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found
