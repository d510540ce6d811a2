"""Shell completion: the script for each shell, and the words it offers. Reads names only, so that a Tab answers at
once."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

from dcgen_convert.recipe import shelf

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_DCGEN_CONVERT_COMPLETE"


def script(command: click.Command, shell: str) -> str:
    """The text that a shell must source, e.g. `eval "$(dcgen-convert completion bash)"`."""
    kind = get_completion_class(shell)
    if kind is None:
        raise ValueError(f"no completion for the shell {shell!r}")
    return kind(command, {}, "dcgen-convert", VARIABLE).source()


def _starting(words: list[str], prefix: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in sorted(set(words)) if word.startswith(prefix)]


def recipes(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _starting(shelf.names(), incomplete) or [CompletionItem(incomplete, type="file")]


def sources(_ctx: click.Context, _param: click.Parameter | None, incomplete: str) -> list[CompletionItem]:
    from dcgen_convert.families.catalog import SOURCES

    return _starting([*shelf.names(), *SOURCES], incomplete) or [CompletionItem(incomplete, type="file")]


def autoencoders(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from dcgen_convert.families.catalog import AUTOENCODERS

    return _starting(list(AUTOENCODERS), incomplete) or [CompletionItem(incomplete, type="dir")]
