"""`dcgen-convert recipes list | show | copy | validate`: the life cycle of a recipe."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from dcgen_convert.cli import completion
from dcgen_convert.cli.options import CONTEXT, OUTPUT, PLACE, argument, option, output_options, stack
from dcgen_convert.cli.session import Session
from dcgen_convert.core.errors import AccessError, InputError, RecipeError
from dcgen_convert.core.files import read_lines
from dcgen_convert.recipe import shelf

NAME = argument("name", shell_complete=completion.recipes)


@click.group(context_settings=CONTEXT)
def recipes() -> None:
    """List, show, copy and validate recipes."""


@recipes.command("list", context_settings=CONTEXT, short_help="List the shipped recipes.")
@stack(OUTPUT)
@click.pass_obj
def list_recipes(session: Session, **values: Any) -> int:
    """List every shipped recipe with its source, its autoencoder and its first comment line."""
    console = session.begin(**output_options(values))

    rows = [_row(name) for name in shelf.names()]
    width = max(map(len, shelf.names()))
    text = "\n".join(f"{row['name']:<{width}}  {row['source']} -> {row['ae']}: {row['about']}" for row in rows)
    console.result({"schema": "dcgen.recipes/1", "status": "done", "recipes": rows}, text)
    return 0


@recipes.command(context_settings=CONTEXT, short_help="Show every key of a recipe.")
@NAME
@stack(OUTPUT)
@click.pass_obj
def show(session: Session, name: str, **values: Any) -> int:
    """Show every key of recipe NAME with its value and where it comes from."""
    console = session.begin(**output_options(values))
    from dcgen_convert.recipe import loading
    from dcgen_convert.recipe.settings import leaves

    resolved = loading.load(_known(name), complete=False)
    rows = dict(leaves(resolved.recipe.model_dump(mode="json")))
    width = max(map(len, rows))
    text = "\n".join(f"{key:<{width}} = {_yaml(value):<24} # {resolved.origins[key]}" for key, value in rows.items())
    doc = {
        "schema": "dcgen.recipe/1",
        "status": "done",
        "recipe": resolved.recipe.model_dump(mode="json"),
        "origins": resolved.origins,
    }
    console.result(doc, text)
    return 0


@recipes.command(context_settings=CONTEXT, short_help="Write a recipe to a file.")
@NAME
@argument("file", type=PLACE)
@option("--force", is_flag=True, help="Overwrite FILE. Default: off.")
@stack(OUTPUT)
@click.pass_obj
def copy(session: Session, name: str, file: str, force: bool, **values: Any) -> int:
    """Write recipe NAME, with everything that it extends, to FILE, as a start for your own recipe."""
    console = session.begin(**output_options(values))
    import yaml

    from dcgen_convert.recipe.settings import Layers

    path = Path(file)
    if path.exists() and not force:
        raise InputError(f"{file} exists already", "add --force to overwrite it")
    layers = Layers()
    for label, raw in shelf.read(_known(name)):
        layers.add(raw, label)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"# Copied from the shipped recipe {name}.\n" + yaml.safe_dump(layers.values, sort_keys=False), encoding="utf-8"
    )
    console.result({"schema": "dcgen.result/1", "status": "done", "recipe": str(path)}, str(path))
    return 0


@recipes.command(context_settings=CONTEXT, short_help="Check a recipe.")
@NAME
@stack(OUTPUT)
@click.pass_obj
def validate(session: Session, name: str, **values: Any) -> int:
    """Check recipe NAME (or a file): keys, types, combinations, autoencoder, sizes. Exit 2 when it cannot work."""
    console = session.begin(**output_options(values))
    from dcgen_convert.planning.absent import require_here
    from dcgen_convert.planning.impossible import require_possible
    from dcgen_convert.recipe import geometry, loading

    resolved = loading.load(_known(name))
    frames, fps = 0, 0.0
    with suppress(AccessError):  # of a source whose config is not here yet, its own stage asks
        here = resolved.identity.here
        frames, fps = geometry.training_frames(resolved.recipe, here), here.fps
    require_here(resolved.recipe, frames, fps)
    with suppress(AccessError):
        require_possible(resolved.recipe, resolved.identity.here)
    console.result({"schema": "dcgen.result/1", "status": "done", "recipe": name, "valid": True}, f"{name}: valid")
    return 0


def _known(name: str) -> str:
    """NAME, if it is a recipe. A source of the catalogue is none."""
    if shelf.find(name) is None:
        raise RecipeError(f"unknown recipe {name!r}{shelf.nearest(name, shelf.names())}", "dcgen-convert recipes list")
    return name


def _row(name: str) -> dict[str, Any]:
    """What the list shows of a recipe: its source and autoencoder, and its first line when that is a comment."""
    merged: dict[str, Any] = {}
    for _, raw in shelf.read(name):
        merged |= raw
    return {"name": name, "source": merged.get("source"), "ae": merged.get("ae"), "about": _about(name)}


def _about(name: str) -> str:
    path = shelf.find(name)
    first = next(iter(read_lines(path)), "") if path else ""
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
