"""How texts that a stranger may have written are shown: on a terminal, in a log, in a table."""

from __future__ import annotations

import re

# C0 and C1 controls but tab and newline; marks that change the direction of text; line separators; lone surrogates.
_HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def plain(text: str, *, bytes_kept: bool = False) -> str:
    """``text`` with every character that commands a terminal, or that cannot be written, as an escape like \\x1b.

    Python keeps bytes of a file name that are not of the locale's encoding as surrogates. They become the text that
    they are in UTF-8, or escapes like \\xe9.

    Args:
        bytes_kept: leave such bytes as they are, for a stream that gives them back (`surrogateescape`).
    """
    if text.isascii() and text.isprintable():
        return text
    if bytes_kept:
        return _HARMFUL.sub(lambda found: found[0] if "\udc80" <= found[0] <= "\udcff" else _escape(found), text)
    named = re.sub(r"[\udc80-\udcff]+", lambda found: _decoded(found[0]), text)
    return _HARMFUL.sub(_escape, named)


def count_of(number: int, noun: str) -> str:
    """ "1 picture", "2 pictures": a number with its noun."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def one_line(text: str) -> str:
    """`plain` in one line: newlines and tabs become escapes too."""
    return plain(text).replace("\n", "\\n").replace("\t", "\\t")


def _decoded(surrogates: str) -> str:
    return surrogates.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
