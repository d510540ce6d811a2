"""Layers of settings: nested values, dotted keys, and the origin of each; pydantic's errors as one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from dcgen_convert.core import yaml_text
from dcgen_convert.core.errors import RecipeError
from dcgen_convert.core.limits import shown
from dcgen_convert.recipe.kinds import UNUSABLE
from dcgen_convert.recipe.pictures import PhaseData
from dcgen_convert.recipe.schema import Phase, Recipe

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

FLAGS = {
    "ae": "--ae",
    "base": "--base",
    "loras": "--lora",
    "ae_channels": "--ae-channels",
    "quantize.format": "--quantize",
    "quantize.rank": "--rank",
    "quantize.container": "--container",
    "merge_lora": "--merge-lora",
    "data.path": "--data",
    "data.kind": "--data",
    "data.prompts": "--prompts",
    "resolution": "--resolution",
    "dtype": "--dtype",
    "seed": "--seed",
    "adapt.zero": "--zero",
    "adapt.offload": "--offload",
    "revision": "--revision",
    "bundle.layout": "--layout",
    "budget.gpu_hours": "--max-gpu-hours",
    "budget.hours": "--hours",
}
"""Recipe key -> the option that sets it."""
REMOVED = ("adapt.null_pass", "align_embedder.noise_aware")
"""Keys of version 0.1.0 that are no more."""
RENAMED = {"quantize.share": "quantize.fuse_qkv"}
"""Key of version 0.1.0 -> what it is called now."""


def leaves(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every leaf. A list of mappings is walked by index; other lists, and tables, are leaves."""
    if isinstance(value, dict) and value and not _is_table(value):
        items: Iterable = value.items()
    elif isinstance(value, (list, tuple)) and value and all(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        yield prefix, value
        return
    for key, item in items:
        yield from leaves(item, f"{prefix}.{key}" if prefix else str(key))


def _is_table(value: Mapping) -> bool:
    """Whether it is one value, a table of numbers ({256: 192}), and no group of settings."""
    return bool(value) and all(str(key).isdigit() for key in value)


def schema_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of the schema; phases appear as `adapt.phases.*.KEY`."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        if key == "adapt.phases":
            keys += [f"{key}.*.{inner}" for inner in Phase.model_fields]
            keys += [f"{key}.*.data.{inner}" for inner in PhaseData.model_fields]
        elif isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += schema_keys(info.annotation, f"{key}.")
        else:
            keys.append(key)
    return keys


class Layers:
    """Settings of several layers, added weakest first.

    Attributes:
        values: the nested result.
        origins: dotted key -> the layer that it comes from.
    """

    def __init__(self) -> None:
        self.values: dict = {}
        self.origins: dict[str, str] = {}

    def add(self, values: Mapping, origin: str) -> None:
        """Lay a nested mapping over what is there; a list of phases replaces the whole list."""
        self._merge(self.values, values, "", origin)

    def _merge(self, into: dict, values: Mapping, prefix: str, origin: str) -> None:
        for key, value in values.items():
            dotted = f"{prefix}{key}"
            if isinstance(value, Mapping) and not _is_table(value):
                if not isinstance(into.get(key), dict):
                    into[key] = {}
                self._merge(into[key], value, f"{dotted}.", origin)
            else:
                into[key] = _copy(value)
                self._mark(dotted, value, origin)

    def _mark(self, dotted: str, value: object, origin: str) -> None:
        for old in [key for key in self.origins if key == dotted or key.startswith(f"{dotted}.")]:
            del self.origins[old]
        for key, _ in leaves(value, dotted):
            self.origins[key] = origin

    def add_environment(self, env: Mapping[str, str], prefix: str) -> None:
        """DCGEN_CONVERT_ADAPT__EMA=0.99 -> adapt.ema."""
        for name in sorted(env):
            if name.startswith(prefix):
                key = name[len(prefix) :].lower().replace("__", ".")
                self.add_dotted(key, yaml_text.parse(env[name], f"env {name}"), f"env {name}")

    def add_sets(self, sets: Iterable[str]) -> None:
        """`--set key=value`; the value is read as YAML (numbers, true, null, [1, 14])."""
        for text in sets:
            key, equals, value = text.partition("=")
            if not equals or not key.strip():
                raise RecipeError(f"--set takes KEY=VALUE, not {shown(text)}", "for example --set adapt.ema=0.99")
            where = f"--set {shown(key.strip())[1:-1]}: {shown(value)}"
            self.add_dotted(key.strip(), yaml_text.parse(value, where), "--set")

    def add_flag(self, key: str, value: object) -> None:
        """One command-line option. `resolution` is the final picture side: earlier phases keep theirs up to it."""
        origin = f"flag {FLAGS.get(key, key)}"
        if key != "resolution":
            self.add_dotted(key, value, origin)
            return
        self.add_dotted("data.resolution", value, origin)
        phases = self._phases()
        for i, phase in enumerate(phases):
            own = phase.get("resolution", value)
            below = isinstance(own, int) and isinstance(value, int) and own <= value
            if i == len(phases) - 1 or not below:
                self.add_dotted(f"adapt.phases.{i}.resolution", value, origin)

    def add_dotted(self, key: str, value: object, origin: str) -> None:
        """Set one key. `lora.KEY` means every LoRA phase, `adapt.phases.*.KEY` every phase, `adapt.phases.0.KEY`
        one."""
        for path in self._expand(key):
            self._set(path, value, origin, key)

    def _phases(self) -> list[dict]:
        """The phases as far as they are written down; a value of another form is refused by the schema, later."""
        adapt = self.values.get("adapt")
        phases = adapt.get("phases") if isinstance(adapt, dict) else None
        return [phase if isinstance(phase, dict) else {} for phase in phases] if isinstance(phases, list) else []

    def _expand(self, key: str) -> list[list[str]]:
        parts = key.split(".")
        phases = self._phases()
        if parts[0] == "lora" and len(parts) == 2:
            chosen = [str(i) for i, phase in enumerate(phases) if phase.get("mode", "lora") == "lora"]
            if not chosen:
                raise RecipeError(f"{key} is set, but the recipe has no LoRA phase", "set adapt.phases.*.KEY instead")
            return [["adapt", "phases", i, parts[1]] for i in chosen]
        if parts[:3] == ["adapt", "phases", "*"]:
            return [["adapt", "phases", str(i), *parts[3:]] for i in range(len(phases))]
        return [parts]

    def _set(self, path: list[str], value: object, origin: str, key: str) -> None:
        node: object = self.values
        for part in path[:-1]:
            if isinstance(node, list):
                if not part.isdigit() or int(part) >= len(node):
                    raise RecipeError(
                        f"{key}: there is no phase {part!r} (the recipe has {len(node)}, counted from 0)",
                        "adapt.phases.*.KEY means all",
                    )
                node = node[int(part)]
            elif isinstance(node, dict):
                if node.get(part) is None:  # absent, or the group that is null by default
                    node[part] = {}
                node = node[part]
            else:
                raise RecipeError(unknown_key(key), "dcgen-convert recipes show NAME prints every key")
        if not isinstance(node, dict):
            raise RecipeError(unknown_key(key), "dcgen-convert recipes show NAME prints every key")
        node[path[-1]] = _copy(value)
        self._mark(".".join(path), value, origin)

    def origins_of(self, recipe: Recipe) -> dict[str, str]:
        """The origin of every leaf of a validated recipe: recorded, derived, or "default"."""
        found: dict[str, str] = {}
        for key, _ in leaves(recipe.model_dump(mode="python")):
            follows = _follows(key, recipe)
            recorded = self.origins.get(key, follows or "default")
            found[key] = follows if follows and self._value(key) is None else recorded
        return found

    def _value(self, dotted: str) -> object:
        node: object = self.values
        for part in dotted.split("."):
            if isinstance(node, list) and part.isdigit():
                node = node[int(part)]
            elif isinstance(node, dict):
                node = node.get(part)
            else:
                return None
        return node


def _follows(key: str, recipe: Recipe) -> str | None:
    """The origin of a setting that follows from others when it is left out; None for every other setting."""
    if key.endswith(".alpha"):
        return "derived: = rank"
    if key == "align_head.steps":
        closed = recipe.align_head.method == "least-squares"
        return f"derived: the start of the head is {'a' if closed else 'no'} closed form"
    return None


def _copy(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value


def unknown_key(key: str) -> str:
    """`unknown key 'adapt.emma'; did you mean 'adapt.ema'?`"""
    if key in REMOVED:
        return f"unknown key {key!r}; this version does not have it any more, so delete it"
    if key in RENAMED:
        return f"unknown key {key!r}; it is called {RENAMED[key]!r} now"
    known = schema_keys()
    generic = ".".join("*" if part.isdigit() else part for part in key.split("."))
    last = generic.rpartition(".")[2]
    same_last = [name for name in known if name.rpartition(".")[2] == last]
    hits = difflib.get_close_matches(generic, same_last, n=1, cutoff=0)
    hits = hits or difflib.get_close_matches(generic, known, n=1)
    if not hits:
        by_last = {name.rpartition(".")[2]: name for name in known}
        hits = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1)]
    return f"unknown key {shown(key)}" + (f"; did you mean {hits[0]!r}?" if hits else "")


def one_sentence(exc: ValidationError, layers: Layers) -> str:
    """The first complaint of pydantic as a sentence that names the key, the wrong value and where it was set."""
    errors = exc.errors()
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    key = _dotted(first["loc"])
    unknown = first["type"] == "extra_forbidden"
    if unknown:
        key = next((recorded for recorded in layers.origins if recorded.startswith(f"{key}.")), key)
    origin = layers.origins.get(key)
    where = f" (from {origin})" if origin else ""
    kind, context = first["type"], first.get("ctx", {})
    if unknown:
        return unknown_key(key) + where
    if kind == "missing":
        return f"{key} is missing"
    if kind == UNUSABLE:
        return f"{key} {context['fault']}{where}"
    if kind == "value_error":
        return str(context["error"])
    same = [error for error in errors if _dotted(error["loc"]) == key]
    return f"{key} must be {_wanted(same)}, not {shown(first['input'])}{where}"


def _dotted(loc: tuple[int | str, ...]) -> str:
    """The dotted key of an error's location, without the labels that pydantic adds for the branches of a union."""
    parts = [str(part) for part in loc]
    known = {segment for key in schema_keys() for segment in key.split(".")}
    while (
        len(parts) > 1
        and not parts[-1].isdigit()
        and parts[-1] not in known
        and ("[" in parts[-1] or "-" in parts[-1] or parts[-1] in _BRANCHES)
    ):
        parts.pop()
    return ".".join(parts)


_BRANCHES = ("float", "int", "str", "bool", "constrained-float", "literal")
_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "model": "a group of settings",
    "dict": "a group of settings",
    "tuple": "a list",
    "list": "a list",
    "finite": "a finite number",
}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
    "too_short": ("a longer list, at least", "min_length"),
}


def _wanted(errors: list[ErrorDetails]) -> str:
    texts = []
    for error in errors:
        name, ctx = error["type"], error.get("ctx", {})
        if name == "literal_error":
            texts.append(f"one of {ctx['expected']}".replace(" or ", ", "))
        elif name in _LIMITS:
            word, field = _LIMITS[name]
            texts.append(f"{word} {_number(ctx[field])}")
        else:
            texts.append(_NAMES.get(name.split("_")[0], name.replace("_", " ")))
    return " or ".join(dict.fromkeys(texts))


def _number(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
