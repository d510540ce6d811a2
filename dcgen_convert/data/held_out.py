"""Which rows are held out, and in which order rows are chosen: how many of a data set that is there or only planned."""

import hashlib
from collections.abc import Iterable, Sequence


def held_out_rows(rows: int) -> int:
    """A twentieth of ``rows``, 1 to 512: no training sees them."""
    return min(max(1, rows // 20), 512)


def from_everywhere(rows: Iterable[int], names: Sequence[str]) -> list[int]:
    """``rows`` in the order of the hashes of their names: the first ones come from everywhere in the data."""
    return sorted(rows, key=lambda row: hashlib.sha256(names[row].encode(errors="surrogateescape")).digest())
