"""Recipes: finding them, layering settings over them, and remembering where every value came from.

Precedence, strongest first: flag > --set > environment (DCGEN_CONVERT_ADAPT__EMA=0.99) > recipe > family's recipe >
default. `load` is the only entrance; it returns a `Resolved`, whose `origins` names the layer of each dotted key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import ValidationError

from dcgen_convert.core.errors import RecipeError
from dcgen_convert.recipe.schema import (
    Adapt,
    AlignEmbedder,
    AlignHead,
    Bundle,
    Calibration,
    Data,
    Evaluate,
    Latents,
    Phase,
    Quantize,
    Recipe,
    Watch,
)
from dcgen_convert.recipe.settings import Layers, one_sentence

__all__ = [
    "Adapt",
    "AlignEmbedder",
    "AlignHead",
    "Bundle",
    "Calibration",
    "Data",
    "Evaluate",
    "Latents",
    "Machine",
    "Phase",
    "Quantize",
    "Recipe",
    "Resolved",
    "Watch",
    "find",
    "load",
    "names",
    "read",
]

ENV_PREFIX = "DCGEN_CONVERT_"


@dataclass(frozen=True)
class Machine:
    """Where a run happens and who watches: no part of the recipe, so it never changes a fingerprint.

    track: "tensorboard" | "wandb" | None; rank_timeout: seconds after which a silent rank is given up, 0 disables.
    """

    gpus: int | None = None
    hostfile: str | None = None
    offline: bool = False
    track: str | None = None
    rank_timeout: float = 120.0


@dataclass(frozen=True)
class Resolved:
    """A recipe with every value decided.

    origins: dotted key -> "flag --ae" | "--set" | "env DCGEN_CONVERT_..." | "recipe NAME" | "family default (recipe
        NAME)" | "default" | "derived: ...".
    """

    recipe: Recipe
    origins: dict[str, str]
    machine: Machine = field(default_factory=Machine)


def root() -> Path:
    """The folder of shipped recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Every shipped recipe: `tiny-flux`, `ablations/no-alignment`, ..."""
    base = root()
    return sorted(path.relative_to(base).with_suffix("").as_posix() for path in base.rglob("*.yaml"))


def find(name_or_path: str) -> Path | None:
    """The file of a shipped recipe's name or of a .yaml path; None when it is neither."""
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = Path(text).expanduser()
        if not path.is_file():
            raise RecipeError(f"recipe file not found: {text}", "dcgen-convert recipes list")
        return path
    return root() / f"{text}.yaml" if text in names() else None


def read(name_or_path: str) -> list[tuple[str, dict]]:
    """The recipe and the recipes it extends, weakest first: [(name, raw mapping), ...].

    Raises:
        RecipeError: unknown name (with the nearest one), not a mapping, or a circle of `extends`.
    """
    chain: list[tuple[str, dict]] = []
    name: str | None = str(name_or_path)
    seen: set[Path] = set()
    while name is not None:
        path = find(name)
        if path is None:
            raise RecipeError(f"unknown recipe {name!r}{nearest(name, names())}", "dcgen-convert recipes list")
        if path.resolve() in seen:
            raise RecipeError(f"recipe {name!r} extends itself", "remove one `extends`")
        seen.add(path.resolve())
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise RecipeError(f"{path} is not a mapping of settings", "dcgen-convert recipes show tiny-flux")
        values.setdefault("name", path.stem)
        name = values.pop("extends", None)
        chain.insert(
            0,
            (path.relative_to(root()).with_suffix("").as_posix() if path.is_relative_to(root()) else str(path), values),
        )
    return chain


def load(
    name_or_path: str,
    *,
    flags: Mapping[str, object] | None = None,
    sets: Iterable[str] = (),
    env: Mapping[str, str] | None = None,
    recipe: str | None = None,
    machine: Machine | None = None,
) -> Resolved:
    """Resolve SOURCE (recipe name, .yaml, catalogue source, path or hub id) and every setting over it.

    Args:
        flags: dotted key -> value, from command-line options; None values are ignored.
        sets: "key=value" texts; `lora.KEY` and `adapt.phases.*.KEY` address all LoRA phases / all phases.
        env: environment; only DCGEN_CONVERT_* is read, `__` separates levels. None reads nothing.
        recipe: a recipe to use for a SOURCE that is not one.
    Raises:
        RecipeError: unknown key, wrong type, impossible combination, unknown autoencoder, a size that is no multiple
            of f*p.
    """
    from dcgen_convert import families
    from dcgen_convert.recipe import geometry, sources

    completing = (flags or {}).get("base")
    base, source = sources.recipe_for(str(name_or_path), recipe, bool(machine and machine.offline), completing)
    layers = Layers()
    for label, values in read(base):
        layers.add(values, f"recipe {label}" if source is None or recipe else f"family default (recipe {label})")
    if source is not None and base == families.Family.recipe:
        layers.add(sources.family_defaults(source, bool(machine and machine.offline), completing), "family default")
    if source is not None:
        layers.add({"source": source, "name": sources.short_name(source)}, "argument SOURCE")
    layers.add_environment(env or {}, ENV_PREFIX)
    layers.add_sets(sets)
    for key, value in (flags or {}).items():
        if value is not None:
            layers.add_flag(key, value)
    resolved = Resolved(*_validated(layers), machine or Machine())
    geometry.check(resolved.recipe)
    return resolved


def _validated(layers: Layers) -> tuple[Recipe, dict[str, str]]:
    try:
        recipe = Recipe.model_validate(layers.values)
    except ValidationError as exc:
        raise RecipeError(one_sentence(exc, layers), "dcgen-convert recipes show NAME prints every key") from exc
    return recipe, layers.origins_of(recipe)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'flux-krea'?` or an empty text."""
    hits = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {hits[0]!r}?" if hits else ""
