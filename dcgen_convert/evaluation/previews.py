"""What the measures say of a sample grid: drawn pictures of held-out captions, beside the autoencoder's round trips.

The round trips are the training's own pictures of the same captions, encoded and decoded: the best that the new
autoencoder allows. One line per measure has the columns

    measure, value     the mean score of the drawn pictures, or their distance from the round trips
    round_trip         of a score: the mean of the round trips. difference: value - round_trip, by pairs, with its 95 %
                       interval low to high
    other_prompts      of a score that reads the caption: the mean with the captions of other pictures. gain: what the
                       pictures' own captions have more, by pairs, with its 95 % interval gain_low to gain_high;
                       gain_round_trip: the same of the round trips
    halves             of a distance: between two halves of the round trips. ratio: how far one half of the drawn
                       pictures is from the other half of the round trips, divided by that; near 1 they look alike
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image
from torch import Tensor

from dcgen_convert.core import pulse
from dcgen_convert.evaluation import paired, rows
from dcgen_convert.evaluation.measure import Distance, Measure, Score
from dcgen_convert.evaluation.pixels import from_images
from dcgen_convert.evaluation.rows import Figures

Shown = Image | Sequence[Image]  # a picture; the frames of a video
BESIDE = "round trip"
FEWEST_OF_HALVES = 4  # pictures; a distance needs two in each half


@dataclass(frozen=True)
class Judged:
    """What was measured on ``count`` pictures or videos of one column. other: scores with the captions of others."""

    own: Figures
    other: Figures
    count: int


def seen(
    pictures: Sequence[Shown],
    captions: Sequence[str],
    measures: Sequence[Measure],
    sources: Sequence[Image] = (),
) -> Judged:
    """Measure the pictures of one column, or its videos, one by one: they may be large, and of several shapes.

    Args:
        sources: of edited pictures what each was made from; of videos that were drawn from a picture that picture.
    """
    readers = [measure for measure in measures if isinstance(measure, Score) and measure.reads]
    others = [*captions[1:], *captions[:1]]  # of the next picture

    def with_captions(texts: Sequence[str]) -> Iterator[rows.Batch]:
        for picture, text, *source in zip(pictures, texts, *([sources] if sources else []), strict=True):
            shown = _pixels(picture)
            yield (shown, [text], from_images(source)) if source else (shown, [text])
            pulse.bump()

    own, other = rows.measured(with_captions(captions), measures), rows.measured(with_captions(others), readers)
    return Judged(own, other, len(captions))


def lines(drawn: Judged, trips: Judged, measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """One line per measure that has a value; see the head of this module."""
    table = rows.rows({rows.CONVERTED: drawn.own, rows.BASE: trips.own}, measures)
    found = []
    for measure, row in zip(measures, table, strict=True):
        if rows.CONVERTED not in row:
            continue
        line = {"measure": measure.name, "value": row[rows.CONVERTED], "beside": BESIDE}
        if isinstance(measure, Distance):
            line |= _apart(measure, drawn, trips)
        else:
            line |= {"round_trip": row.get(rows.BASE), **{key: row.get(key) for key in ("difference", "low", "high")}}
            line |= _gain(measure.name, drawn, trips)
        found.append({key: value for key, value in line.items() if value is not None})
    return found


def _pixels(shown: Shown) -> Tensor:
    """A picture as (1, 3, H, W) in [-1, 1], the frames of a video as (1, 3, F, H, W)."""
    return from_images([*shown]).movedim(0, 1)[None] if isinstance(shown, Sequence) else from_images([shown])


def _gain(name: str, drawn: Judged, trips: Judged) -> dict[str, float]:
    """How much better the pictures fit their own captions than others, by pairs."""
    if name not in drawn.other.scores:
        return {}
    other = drawn.other.scores[name]
    if (other + drawn.own.scores[name]).isnan().all():
        return {}
    pairs = paired.compare(other, drawn.own.scores[name])
    found = {"other_prompts": pairs.mean_a, "gain": pairs.difference, "gain_low": pairs.low, "gain_high": pairs.high}
    best = (trips.own.scores[name] - trips.other.scores[name]).nanmean().item()
    return found if math.isnan(best) else {**found, "gain_round_trip": best}


def _halves(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The features of every second of ``count`` pictures or videos, and as many of the others."""
    each = features.unflatten(0, (count, -1))
    first, second = (each[start::2][: count // 2].flatten(0, 1) for start in (0, 1))
    return first, second


def _apart(measure: Distance, drawn: Judged, trips: Judged) -> dict[str, float]:
    """How far halves of the round trips are apart, and how far halves of the drawn pictures are from them.

    All frames of a video are in one half.
    """
    if trips.count < FEWEST_OF_HALVES:
        return {}
    (mine, other), (best, second) = (_halves(one.own.features[measure.name], one.count) for one in (drawn, trips))
    halves = measure.distance(best, second)
    crossed = (measure.distance(mine, second) + measure.distance(other, best)) / 2
    return {"halves": halves, **({"ratio": crossed / halves} if halves else {})}
