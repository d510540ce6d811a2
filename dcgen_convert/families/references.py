"""The references of an editing model inside a condition."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE = "reference"


def reference_keys(count: int) -> tuple[str, ...]:
    """Keys of ``count`` references in a condition, in the cache and in files_of: reference, reference-2, ..."""
    return tuple(REFERENCE if number == 1 else f"{REFERENCE}-{number}" for number in range(1, count + 1))


def references_of(text: dict[str, Tensor]) -> list[Tensor]:
    """The clean latents of the references in a condition, in their order: (B, C, h', w') each.

    All rows of a batch have the same number. Each may have a size of its own, other than the target's.
    """
    keys = [key for key in text if key.partition("-")[0] == REFERENCE]
    return [text[key] for key in reference_keys(len(keys))]
