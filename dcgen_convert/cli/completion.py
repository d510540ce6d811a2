"""Shell completion: the script for each shell, and the words it offers. Reads names only, so that a Tab answers at
once."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_DCGEN_CONVERT_COMPLETE"


def script(command: click.Command, shell: str) -> str:
    """The text that a shell must source, e.g. `eval "$(dcgen-convert completion bash)"`."""
    return get_completion_class(shell)(command, {}, "dcgen-convert", VARIABLE).source()


def recipe_names() -> list[str]:
    """Shipped recipes by name, without reading them."""
    package = Path(__file__).resolve().parents[1]
    base = package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"
    return sorted(path.relative_to(base).with_suffix("").as_posix() for path in base.rglob("*.yaml"))


def _starting(words: list[str], prefix: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in sorted(set(words)) if word.startswith(prefix)]


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _starting(recipe_names(), incomplete) or [CompletionItem(incomplete, type="file")]


def sources(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from dcgen_convert.families.catalog import SOURCES

    return _starting([*recipe_names(), *SOURCES], incomplete) or [CompletionItem(incomplete, type="file")]


def autoencoders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from dcgen_convert.families.catalog import AUTOENCODERS

    return _starting(list(AUTOENCODERS), incomplete) or [CompletionItem(incomplete, type="dir")]
