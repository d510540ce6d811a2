"""Which rows are paired: have latents of the base's autoencoder too.

All of them, where they are few. Else the rows of the smallest hashes of names, of every table as large a share: so they
come from everywhere in the data, and no size and no number of references is without any. A twentieth of them are held
out, as of a data set of that size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dcgen_convert.data import buckets
from dcgen_convert.data.buckets import Span
from dcgen_convert.data.held_out import from_everywhere, held_out_rows


def paired_rows(
    names: Sequence[str],
    held_out: Sequence[int],
    spans: Sequence[Span],
    enough: int,
    before: Sequence[int] = (),
    rows: int = 0,
) -> list[int]:
    """``enough`` rows, ascending, and up to two more for each table, as shares are rounded up.

    Args:
        names: one per row.
        held_out: the rows that no training sees, ascending.
        spans: of all rows, at the resolution of the first phase.
        before: what is paired of the first ``rows``; they stay as they are, and only later rows are added.
    """
    known = set(before)
    wanted = min(enough, len(names))
    unseen, hidden = min(len(held_out), held_out_rows(wanted)), set(held_out)
    chosen = [*before]
    for parts in buckets.tables(spans).values():
        table = [row for part in parts for row in part.rows]
        for is_held, count, every in (
            (True, unseen, len(hidden)),
            (False, wanted - unseen, len(names) - len(hidden)),
        ):
            own = [row for row in table if (row in hidden) == is_held]
            missing = math.ceil(count * len(own) / every) - sum(row in known for row in own) if own else 0
            if missing > 0:
                chosen += from_everywhere((row for row in own if row >= rows), names)[:missing]
    return sorted(chosen)
