"""How large a number, and how long a text, may be.

The bounds lie far beyond anything useful, and within what torch, PIL, JSON and file systems take. Beyond them stands a
slip of the keyboard, which would otherwise end in an error of a library, or in a list that fills the memory.
"""

from __future__ import annotations

import re

from dcgen_convert.core.errors import InputError

COUNT = 10**9  # steps, pictures, tokens
PICTURES = 100_000  # pictures that are only looked at, or calibrate
BATCH = 1_000_000
SIDE = 65_536  # px
RANKS = 1_024  # processes on one host
LORA_RANK = 16_384
SEED = 2**63 - 1
AMOUNT = 1e9  # guidance, norms, factors
SMALLEST = 1e-12  # what must be above 0
LETTERS = 4_096  # bytes in UTF-8: the longest path of Linux

RANGES: dict[str, tuple[float, float]] = {
    "height": (1, SIDE),
    "width": (1, SIDE),
    "resolution": (1, SIDE),
    "steps": (1, COUNT),
    "count": (1, COUNT),
    "pictures": (2, COUNT),
    "guidance": (0, AMOUNT),
    "seed": (0, SEED),
    "gpus": (1, RANKS),
    "restarts": (0, COUNT),
    "rank_timeout": (0, AMOUNT),
    "seconds": (SMALLEST, AMOUNT),
    "gpu_memory": (SMALLEST, AMOUNT),
    "port": (0, 65_535),
    "disk": (0, AMOUNT),
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]|[\ud800-\udc7f\udd00-\udfff]")  # \udc80 and up are bytes of a file's name


def require(**values: float | None) -> None:
    """InputError when one of the settings of RANGES lies outside its range. None stands for a default."""
    for name, value in values.items():
        low, high = RANGES[name]
        if value is not None and not low <= value <= high:  # NaN lies nowhere
            raise InputError(f"{name} is {shown(value)}", f"give a number from {low:g} to {high:g}")


def require_text(name: str, text: str) -> None:
    """InputError when ``text`` can name no file, folder or model."""
    if fault := fault_of(text):
        raise InputError(f"{name} {fault}", "give another name")


def fault_of(text: str) -> str | None:
    """Why ``text`` can name no file, folder or model, as the end of a sentence; None when it can."""
    if not text.strip():
        return "is empty"
    if found := _CONTROL.search(text):
        return f"holds the character {found[0]!r}: {shown(text)}"
    size = len(text.encode("utf-8", "surrogatepass"))
    return f"has {size:,} bytes, and at most {LETTERS:,} can be used" if size > LETTERS else None


def shown(value: object) -> str:
    """``value`` as Python writes it, at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"
