"""Prompts for synthetic data: a list of the user's, the built-in generator, or the tiny world's captions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dcgen_convert.data import grammar, prompt_lists

BUILTIN = "builtin"
KINDS = (BUILTIN, "tiny-world", "tiny-edits", "tiny-videos")  # anything else names a list
CAPTIONS = (
    BUILTIN,
    "tiny-world",
    "tiny-videos",
)  # those that describe a picture; a model that edits needs instructions
BLOCK = 1024  # captions of the tiny world that are drawn at once
MANY = 10_000  # pictures from which on the built-in prompts are too few


def make(kind: str, count: int, seed: int, classes: list[str] | None = None, offline: bool = False) -> list[str]:
    """``count`` prompts. A larger count begins with the same ones.

    Args:
        kind: one of KINDS, or what `prompt_lists.read` takes.
        classes: labels of a class-conditional model; then all KINDS draw labels uniformly.
        offline: take a data set of the hub from the cache only.
    Raises:
        InputError, AccessError: as `prompt_lists.read`.
    """
    if kind in KINDS:
        return generated(kind, count, seed, classes)
    return of_list(prompt_lists.read(kind, offline).texts, count, seed)


def generated(kind: str, count: int, seed: int, classes: list[str] | None = None) -> list[str]:
    """`make` for KINDS."""
    if classes:
        generator = random.Random(seed)
        return [generator.choice(classes) for _ in range(count)]
    if kind in ("tiny-world", "tiny-videos"):
        from dcgen_convert.tiny import videos, world

        drawn = videos if kind == "tiny-videos" else world
        blocks = (drawn.sample_labels(BLOCK, world.block_seed(seed, block)) for block in range(-(-count // BLOCK)))
        return [drawn.caption(row) for block in blocks for row in block.tolist()][:count]
    if kind == "tiny-edits":
        from dcgen_convert.data import drawn_edits

        return drawn_edits.sampled(count, seed)[1]
    return grammar.prompts(count, seed)


def usual(kind: str | None) -> str:
    """``kind`` where it can be made on every machine, else the built-in prompts; None: nothing is known."""
    return kind if kind in KINDS else BUILTIN


def of_list(texts: tuple[str, ...], count: int, seed: int, begun: Sequence[str] = ()) -> list[str]:
    """``count`` of the texts, shuffled by the seed; all of them before one comes again.

    Args:
        begun: the prompts of the first pictures, from a time when the list may have been shorter. They stay, if the
            list still has them all: so pictures that were drawn are kept when prompts are added.
    """
    order = prompt_lists.ordered(texts, seed)
    kept = list(begun) if set(texts).issuperset(begun) else []
    used = set(kept)
    found = [*kept, *(text for text in order if text not in used)][:count]
    return [*found, *(order[i % len(order)] for i in range(len(found), count))]


def told(kind: str, count: int, offline: bool = False) -> str:
    """What the user should know of a list of prompts before ``count`` pictures are drawn from it; mostly empty."""
    return "" if kind in KINDS else prompt_lists.read(kind, offline).told(kind, count)


def doubt(kind: str, count: int) -> str:
    """Why the built-in prompts will not do for ``count`` pictures; empty where they may."""
    if kind != "builtin" or count <= MANY:
        return ""
    subjects = grammar.subjects()
    return (
        f"data.prompts builtin: {count:,} pictures would be drawn from {subjects:,} subjects ({grammar.nouns()} nouns) "
        f"and {grammar.settings()} phrases for style, place, light and detail, so each subject comes "
        f"{count / subjects:.1f} times. The prompts decide what the model keeps: give --prompts FILE with captions of "
        "what it shall draw (.txt, or FILE:COLUMN of a .jsonl, .csv or .parquet, or hf://datasets/ORG/NAME:COLUMN)"
    )
