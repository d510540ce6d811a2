"""The shelf of recipes: those that ship with the package, and .yaml files with what they extend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dcgen_convert.core import yaml_text
from dcgen_convert.core.errors import RecipeError
from dcgen_convert.core.files import read_text

EXPERIMENTS = "experiments"  # folder of claims and the conversions that test them (tools/experiments.py): no recipes


def root() -> Path:
    """The folder of shipped recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Every shipped recipe: `tiny-flux`, `ablations/no-alignment`, ..."""
    base = root()
    found = (path.relative_to(base) for path in base.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in found if path.parts[0] != EXPERIMENTS)


def find(name_or_path: str, beside: Path | None = None) -> Path | None:
    """The file of a shipped recipe's name or of a .yaml path; None when it is neither.

    Args:
        beside: folder that a relative path starts from; None: the working directory.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = (beside or Path()) / Path(text).expanduser()
        if not path.is_file():
            raise RecipeError(f"recipe file not found: {path}", "dcgen-convert recipes list")
        return path
    return root() / f"{text}.yaml" if text in names() else None


def read(name_or_path: str) -> list[tuple[str, dict]]:
    """The recipe and all recipes that it extends, weakest first: [(name, settings as written), ...].

    Raises:
        RecipeError: unknown name (with the nearest one), not a mapping, or a circle of `extends`.
    """
    chain: list[tuple[str, dict]] = []
    name: str | None = str(name_or_path)
    seen: set[Path] = set()
    beside = None
    while name is not None:
        path = find(name, beside)
        if path is None:
            raise RecipeError(f"unknown recipe {name!r}{nearest(name, names())}", "dcgen-convert recipes list")
        if path.resolve() in seen:
            raise RecipeError(f"recipe {name!r} extends itself", "remove one `extends`")
        seen.add(path.resolve())
        values = _settings(path)
        name, beside = values.pop("extends", None), path.parent
        shipped = path.is_relative_to(root())
        chain.insert(0, (path.relative_to(root()).with_suffix("").as_posix() if shipped else str(path), values))
    return chain


def _settings(path: Path) -> dict[str, Any]:
    """What a recipe file says, with a name."""
    values = yaml_text.parse(read_text(path), str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a mapping of settings", "dcgen-convert recipes show tiny-flux")
    if not isinstance(values.get("extends"), str | None):
        raise RecipeError(f"extends of {path} must be the name of one recipe", "dcgen-convert recipes list")
    return {"name": path.stem, **values}


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'flux-krea'?` or an empty text."""
    hits = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {hits[0]!r}?" if hits else ""
