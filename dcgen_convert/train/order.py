"""Which rows each step sees: by (seed, step) alone, so that any number of ranks and a resumed run see the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIXING = -1  # stream of random numbers that no span has


class Order:
    """Batches of rows of one span each.

    The rows of a span come in one random permutation after the other, cut into batches; a batch goes on into the next
    permutation where one ends. Span b of n_b rows is due ceil((e + 1) n_b / batch) - ceil(e n_b / batch) times in epoch
    e, in a random order of the spans that is drawn per epoch. So every row is seen in the first epoch, all are seen
    equally often in the long run, and a span of fewer rows than a batch repeats them, but is due the less often.

    Args:
        spans: rows by span.
        batch: rows of a step.
    """

    def __init__(self, spans: Sequence[range], batch: int, seed: int):
        self.spans, self.batch, self.seed = list(spans), batch, seed
        self._epoch, self._due, self._first = -1, torch.empty(0, dtype=torch.int64), 0
        self._permutations: dict[int, tuple[int, Tensor]] = {}

    def rows_of(self, step: int) -> list[int]:
        """Row of every position of the global batch of ``step``."""
        number, turn = self._turn(step)
        return [self._row(number, turn * self.batch + position) for position in range(self.batch)]

    def span_of(self, step: int) -> int:
        """Number of the span that the rows of ``step`` are of."""
        return self._turn(step)[0]

    def _turn(self, step: int) -> tuple[int, int]:
        """(span, batches of it before) at ``step``."""
        self._enter(step)
        place = step - self._first
        number = int(self._due[place])
        return number, self._batches(number, self._epoch) + int((self._due[:place] == number).sum())

    def _batches(self, number: int, epochs: int) -> int:
        """Batches of a span in the first ``epochs``."""
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
        known, permutation = self._permutations.get(number, (-1, None))
        if turn != known:
            permutation = torch.randperm(len(rows), generator=self._generator(number, turn))
            small = torch.int32 if len(rows) < 2**31 else torch.int64  # 4 bytes for each of many millions of rows
            permutation = permutation.to(small)
            self._permutations[number] = turn, permutation
        return rows[int(permutation[offset])]

    def _generator(self, stream: int, turn: int) -> torch.Generator:
        """Random numbers of the ``turn``-th permutation of a span, or of epoch ``turn`` for MIXING.

        A generator's state follows from the low 32 bits of its seed; the odd multiplier (of Fibonacci hashing) spreads
        over these.
        """
        return torch.Generator().manual_seed((self.seed * 1_000_003 + turn + stream * 0x9E3779B1) % 2**63)
