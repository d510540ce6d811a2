"""What the verb `benchmark` measured, in words: names of its figures, times, and the rows of card and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TEXT, IMAGE, ENCODE, STEP = "text", "image", "encode", "step"
BATCH, DECODE, PICTURE = "step, largest batch", "decode", "picture"
SHARED = (TEXT, IMAGE)  # by base and conversion: one figure for all
WORDS = {
    TEXT: "text encoders",
    IMAGE: "image encoder",
    ENCODE: "encoder",
    STEP: "one step",
    BATCH: "one step, largest batch",
    DECODE: "decoder",
    PICTURE: "whole picture",
}


def rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, value) of a benchmark that a manifest holds."""
    for size in found.get("sizes", ()):
        where = f"Time at {shown(size)} on {found['device']}, {found['dtype']}"
        for what in (ENCODE, STEP, DECODE, PICTURE):
            if what not in size["rows"]:
                continue
            row, ratios = size["rows"][what], size["ratios"][what]
            steps = f" ({found['steps']} steps)" if what == PICTURE else ""
            told = [
                f"{name} {seconds(figure['seconds'])}{f' ({times(ratios[name])})' if name in ratios else ''}"
                for name, figure in row.items()
            ]
            yield f"{where}: {words(what, size)}{steps}", ", ".join(told)


def shown(size: Mapping[str, Any]) -> str:
    """What was drawn: 1024 px, or 480 x 832 px, 77 frames."""
    if "frames" not in size:
        return f"{size['resolution']} px"
    return f"{size['height']} x {size['width']} px, {size['frames']} frames"


def words(what: str, size: Mapping[str, Any]) -> str:
    """The name of a figure, of pictures or of videos."""
    return WORDS[what].replace("picture", "video") if "frames" in size else WORDS[what]


def seconds(value: float) -> str:
    """A time with three digits, in s or ms."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def times(ratio: float) -> str:
    """A ratio: 4.2 x."""
    return f"{ratio:.2f} x"
