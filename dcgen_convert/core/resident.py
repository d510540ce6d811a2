"""How much memory of the host this process uses, as Linux tells it."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MUCH = 2 * 2**30  # bytes; below it the search for garbage takes longer than it is worth
FORGET = "5"  # what Linux wants to be told to forget the highest memory so far


def forget() -> None:
    """Let `highest` begin anew. Where that is not possible (not Linux, or not allowed) it goes on."""
    with suppress(OSError):
        RESET.write_text(FORGET)


def tidy() -> None:
    """`give_back` what nothing refers to any more; circles of objects only where this process uses much memory."""
    if (now() or 0) > MUCH:
        gc.collect()
    give_back()


def give_back() -> None:
    """Give the memory that is free in this process, but kept for later, back to the system. Only glibc can do it."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def highest() -> int | None:
    """Highest resident bytes of this process since `forget`; None where the system does not say."""
    return _read("VmHWM:")


def now() -> int | None:
    """Resident bytes of this process now; None where the system does not say."""
    return _read("VmRSS:")


def _read(name: str) -> int | None:
    with suppress(OSError):
        lines = STATUS.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
    return None
