"""Which rows each step sees.

This depends on the seed and the step alone. So a resumed run, or another number of ranks, sees the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIXING = -1  # stream of random numbers that no span has


class BatchOrder:
    """Batches of rows of one span each.

    Each span has its own endless sequence of rows: one random permutation of the span after the other. Its batches are
    cut from this sequence, so a batch may end one permutation and begin the next.

    In epoch e (the first is 0), span b with n_b rows gives ceil((e + 1) n_b / batch) - ceil(e n_b / batch) batches. The
    order of all batches of an epoch is drawn at random. So every row is seen in the first epoch, and in the long run
    all rows are seen equally often. A span with fewer rows than a batch repeats rows inside a batch, but its batches
    come less often.

    Args:
        spans: rows by span.
        batch: rows of a step.
    """

    def __init__(self, spans: Sequence[range], batch: int, seed: int) -> None:
        self.spans, self.batch, self.seed = list(spans), batch, seed
        self._epoch, self._due, self._first = -1, torch.empty(0, dtype=torch.int64), 0
        self._permutations: dict[int, tuple[int, Tensor]] = {}

    def rows_of(self, step: int) -> list[int]:
        """Row of every position of the global batch of ``step``."""
        number, turn = self._turn(step)
        return [self._row(number, turn * self.batch + position) for position in range(self.batch)]

    def span_of(self, step: int) -> int:
        """Number of the span that the rows of ``step`` belong to."""
        return self._turn(step)[0]

    def _turn(self, step: int) -> tuple[int, int]:
        """(span of ``step``, number of batches of that span before it)."""
        self._enter(step)
        place = step - self._first
        number = int(self._due[place])
        return number, self._batches(number, self._epoch) + int((self._due[:place] == number).sum())

    def _batches(self, number: int, epochs: int) -> int:
        """Number of batches of a span in the first ``epochs`` epochs."""
        return -(-epochs * len(self.spans[number]) // self.batch)

    def _total(self, epochs: int) -> int:
        return sum(self._batches(number, epochs) for number in range(len(self.spans)))

    def _enter(self, step: int) -> None:
        """Draw the order of the spans in the epoch of ``step``."""
        if self._epoch >= 0 and self._first <= step < self._first + len(self._due):
            return
        low, high = 0, 1
        while self._total(high) <= step:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._total(middle) <= step else (low, middle)
        due = [self._batches(number, low + 1) - self._batches(number, low) for number in range(len(self.spans))]
        labels = torch.repeat_interleave(torch.arange(len(due), dtype=torch.int16), torch.tensor(due))
        mixed = torch.randperm(len(labels), generator=self._generator(MIXING, low))
        self._epoch, self._due, self._first = low, labels[mixed], self._total(low)

    def _row(self, number: int, place: int) -> int:
        rows = self.spans[number]
        turn, offset = divmod(place, len(rows))
        if self._permutations.get(number, (-1, rows))[0] != turn:
            permutation = torch.randperm(len(rows), generator=self._generator(number, turn))
            small = torch.int32 if len(rows) < 2**31 else torch.int64  # 4 bytes for each of many millions of rows
            self._permutations[number] = turn, permutation.to(small)
        return rows[int(self._permutations[number][1][offset])]

    def _generator(self, stream: int, turn: int) -> torch.Generator:
        """Random numbers for permutation ``turn`` of a span, or for epoch ``turn`` when the stream is MIXING.

        torch uses only the low 32 bits of a seed. The odd multiplier (Fibonacci hashing) spreads the streams over them.
        """
        return torch.Generator().manual_seed((self.seed * 1_000_003 + turn + stream * 0x9E3779B1) % 2**63)
