"""Foreign words in the model card: names, licences and captions are shown as they are, and can format nothing."""

from __future__ import annotations

import re

SPECIAL = re.compile(r"([\\`*\[\]<>#|!&])")


def one_line(text: object) -> str:
    """``text`` in one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def plain(text: object) -> str:
    """``text`` as one line of Markdown that shows it as it is."""
    return SPECIAL.sub(r"\\\1", one_line(text))


def code(text: object) -> str:
    """``text`` as code inside a line."""
    return f"`{one_line(text).replace('`', chr(39)) or ' '}`"


def block(text: str, language: str) -> str:
    """``text`` as a block of code, which no run of backticks in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(rows: list[tuple[str, str]]) -> str:
    """Rows of two columns without a head."""
    return "\n".join(["| | |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)])
