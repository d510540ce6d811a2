"""Aspect-ratio buckets: the sizes that pictures of mixed shapes are cropped to, and which rows have which size.

Construction: all sides are multiples of `step`. Every width gets the tallest height, and every height gets the widest
width, with which the area does not exceed resolution^2 (NovelAI's "aspect ratio bucketing", 2022). SDXL's table in
arXiv 2307.01952, appendix I, has the same form and ends at 1:4 and 4:1. So no bucket has more tokens than the square:
if the square fits into memory, all buckets fit.

Sizes are (height, width) in px. Rows are sorted by the shape of their picture. So at every resolution a bucket is a
span of rows, and no memory is needed per row. Rows with more references stand in spans of their own: the rows that are
read together have one number of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import groupby, zip_longest
from typing import NamedTuple

WIDEST = 4  # largest ratio of a bucket's sides

Size = tuple[int, int]


class Span(NamedTuple):
    """Rows ``start`` to ``stop`` - 1, which have one size and one number of references.

    Their latents follow one another in the tables base-TABLE and target-TABLE.
    """

    table: str
    height: int
    width: int
    start: int
    stop: int

    @property
    def rows(self) -> range:
        return range(self.start, self.stop)


def sizes(resolution: int, step: int, longest: int | None = None) -> list[Size]:
    """Buckets of about ``resolution``^2 px, from the tallest to the widest.

    Args:
        resolution: side of the square in px, a multiple of ``step``.
        step: px that every side is a multiple of.
        longest: px that no side exceeds; None: no limit but WIDEST.
    """
    square = resolution // step
    sides = range(1, WIDEST * square + 1)
    cells = {pair for a in sides if (b := square**2 // a) for pair in ((a, b), (b, a))}
    most = longest // step if longest else WIDEST * square
    kept = [pair for pair in cells if max(pair) <= min(most, WIDEST * min(pair))]
    return sorted(((h * step, w * step) for h, w in kept), key=lambda size: Fraction(size[1], size[0]))


def nearest(buckets: Sequence[Size], width: int, height: int) -> Size:
    """The bucket with the nearest aspect ratio: cropping the picture to it keeps the largest part. Exact arithmetic.

    When two buckets are equally near, it is the one with more px.
    """

    def lost(size: Size) -> tuple[Fraction, int]:
        a, b = width * size[0], height * size[1]
        return Fraction(max(a, b), min(a, b)), -size[0] * size[1]

    return min(buckets, key=lost)


def by_shape(shapes: Sequence[Size]) -> list[int]:
    """Order of pictures of ``shapes`` (width, height): by aspect ratio."""
    return sorted(range(len(shapes)), key=lambda number: Fraction(*shapes[number]))


def spans(shapes: Sequence[Size], buckets: Sequence[Size], resolution: int, more: Sequence[int]) -> list[Span]:
    """The spans of rows of one bucket and one number of references each.

    Args:
        shapes: (width, height) of every picture, in the order of the rows.
        buckets: empty: all pictures are squares.
        more: references of every row above the fewest that the model reads.
    """
    found, start = [], 0
    known: dict[Size, Size] = {}

    def kind(row: tuple[Size, int]) -> tuple[Size, int]:
        shape, extra = row
        if shape not in known:
            known[shape] = nearest(buckets, *shape) if buckets else (resolution, resolution)
        return known[shape], extra

    for ((height, width), extra), rows in groupby(zip(shapes, more, strict=True), key=kind):
        stop = start + sum(1 for _ in rows)
        size = f"-{height}x{width}" if buckets else ""
        table = f"{resolution}{size}{f'-more{extra}' if extra else ''}"
        found.append(Span(table, height, width, start, stop))
        start = stop
    return found


def whole(count: int, resolution: int) -> list[Span]:
    """One span of squares: what a cache without an own list of spans holds."""
    return [Span(str(resolution), resolution, resolution, 0, count)]


def tables(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """Spans by the table that holds them."""
    found: dict[str, list[Span]] = {}
    for span in spans:
        found.setdefault(span.table, []).append(span)
    return found


def batches(parts: Iterable[range], size: int) -> list[range]:
    """Every row once, at most ``size`` at a time; no batch has rows of two spans."""
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


def first_of_each(parts: Sequence[range], count: int) -> list[list[int]]:
    """``count`` rows to look at, taken from each span in turn. The result has one list for each span."""
    turns = (row for turn in zip_longest(*parts) for row in turn if row is not None)
    chosen = {row for _, row in zip(range(count), turns, strict=False)}
    return [rows for part in parts if (rows := [row for row in part if row in chosen])]
