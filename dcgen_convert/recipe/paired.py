"""How many pictures the base's autoencoder encodes: as many as the alignment of the embedder can use.

The alignment is a regression of D outputs on K inputs, the numbers of a new token. A row is a token. On other pictures
its error lies above that of endless rows by the fraction K / R, if the R rows are independent. Tokens of one picture
hang together: N of them were worth 1.5 to 2.7 sqrt(N) independent ones on the miniatures, with 4 to 64 tokens and 32 or
128 inputs (tests/benchmarks/embedder_rows.py). They count as sqrt(N) here. So with `ROWS` of them for each input
the error lies less than 1 / ROWS above what all other pictures could still give: half a percent.

Large pictures have so many tokens that a few dozen of them were enough by this count. `FEWEST` see to it that they are
of all kinds: if all tokens of a picture were one, 2,048 pictures would still be 64 rows for each of 32 inputs.
"""

from __future__ import annotations

import math

ROWS = 200  # independent rows for each input
FEWEST = 2048  # pictures


def enough(inputs: int, tokens: int) -> int:
    """Pictures that the alignment can use.

    Args:
        inputs: numbers of a new token (K).
        tokens: of a picture on the new grid, at the resolution of the first phase (N).
    """
    return max(FEWEST, math.ceil(ROWS * inputs / math.sqrt(tokens)))


def told(paired: int, count: int, moving: bool, inputs: int, tokens: int) -> str:
    """One line for people: why only ``paired`` of ``count`` pictures are encoded by the base's autoencoder too."""
    noun = "videos" if moving else "pictures"
    return (
        f"the base's autoencoder encodes {paired:,} of {count:,} {noun}: the alignment of the embedder can use no more "
        f"({inputs} inputs, {tokens:,} tokens each)"
    )
