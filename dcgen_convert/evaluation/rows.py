"""What the measures say of several sets of pictures: a row per measure, as evaluation.json and the tables hold it.

The sets, each drawn from the same prompts:

    converted  by the model that is judged
    base       by the model that it is compared with, from the same seeds
    floor      by that model from other seeds: how far two sets are apart where the model is the same
    ceiling    those of `base` through the new autoencoder: what no conversion can exceed
    reference  given pictures, which no model here has drawn
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dcgen_convert.evaluation import paired, video_measures
from dcgen_convert.evaluation.measure import Distance, EditScore, Measure, Score

CONVERTED, BASE, FLOOR, CEILING, REFERENCE = "converted", "base", "floor", "ceiling", "reference"
OTHER = 1_000_000_007  # added to the seeds of the floor
DRAWN = (CONVERTED, BASE, FLOOR, CEILING)
Batch = tuple[Tensor, list[str]] | tuple[Tensor, list[str], Tensor]


@dataclass(frozen=True)
class Figures:
    """What was measured on one set: measure -> (N,) scores, measure -> (N, D) features."""

    scores: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


def measured(batches: Iterable[Batch], measures: Sequence[Measure]) -> Figures:
    """The scores and features of one set, whose pictures come in batches and are not kept.

    Args:
        batches: pictures (B, 3, H, W) in [-1, 1], or videos (B, 3, F, H, W), with their captions; without captions
            nothing is scored. Edited pictures come with those that they were made from, (B, 3, H', W') in [-1, 1], and
            so do videos that were drawn from a picture.
    """
    scores: dict[str, list[Tensor]] = {}
    features: dict[str, list[Tensor]] = {}
    for pictures, captions, *sources in batches:
        for measure in measures:
            if isinstance(measure, Distance):
                found = of_batch(measure, pictures, captions)
                features.setdefault(measure.name, []).append(found.flatten(0, -2))
            elif captions and (sources or not isinstance(measure, EditScore)):
                scores.setdefault(measure.name, []).append(of_batch(measure, pictures, captions, *sources))
    joined = [{name: torch.cat(parts) for name, parts in found.items()} for found in (scores, features)]
    return Figures(*joined)


def of_batch(measure: Measure, pixels: Tensor, captions: list[str], sources: Tensor | None = None) -> Tensor:
    """(B,) scores or (B, D) features. Of videos, a measure of pictures gives the mean score of some frames, or the
    features of each: (B, K, D).
    """
    if pixels.ndim == 5 and not measure.moving:
        frames = video_measures.frames_of(pixels)
        count, each = frames.shape[:2]
        texts = [caption for caption in captions for _ in range(each)]
        found = of_batch(measure, frames.flatten(0, 1), texts).unflatten(0, (count, each))
        return found.mean(1) if measure.kind == "score" else found
    if isinstance(measure, Distance):
        return measure.features(pixels)
    if isinstance(measure, EditScore):
        assert sources is not None, "a measure of edits is chosen where there are edits"
        return measure.scores_of_edits(pixels, sources, captions)
    assert isinstance(measure, Score), "a measure is a score or a distance"
    return measure.scores(pixels, captions)


def rows(sets: Mapping[str, Figures], measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """One row per measure.

    All rows have "measure", "kind", "better", "label" and "unit". A score has the mean of each set under the set's
    name, and "difference" (converted - base, by pairs) with its 95 % interval "low" to "high" and the number of
    "pairs"; "dropped" are the pairs that are left out, as the measure does not apply to a picture of them. A distance
    has the distance to the base under each set's name, "ratio" (converted / floor), and "to_reference": the distance of
    each set to the reference. A figure that cannot be had is left out.
    """
    return [_row(measure, sets) for measure in measures]


def _row(measure: Measure, sets: Mapping[str, Figures]) -> dict[str, Any]:
    head = {name: getattr(measure, name) for name in ("kind", "better", "label", "unit")}
    body = _scores(measure.name, sets) if measure.kind == "score" else {}
    if isinstance(measure, Distance):
        body = _distances(measure, {name: found.features[measure.name] for name, found in sets.items()})
    return {"measure": measure.name, **head, **body}


def _scores(name: str, sets: Mapping[str, Figures]) -> dict[str, Any]:
    every = {one: found.scores[name] for one, found in sets.items() if name in found.scores}
    found: dict[str, Any] = {one: _mean(values) for one, values in every.items()}
    if CONVERTED in every and BASE in every and not (every[BASE] + every[CONVERTED]).isnan().all():
        pairs = paired.compare(every[BASE], every[CONVERTED])
        found |= {"difference": pairs.difference, "low": pairs.low, "high": pairs.high, "pairs": pairs.pairs}
        found |= {"dropped": pairs.dropped} if pairs.dropped else {}
    return {key: value for key, value in found.items() if value is not None}


def _mean(values: Tensor) -> float | None:
    """The mean of the pictures that the measure applies to; None where there is none."""
    mean = values.nanmean().item()
    return None if math.isnan(mean) else mean


def _distances(measure: Distance, sets: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if BASE in sets:
        others = [name for name in (CONVERTED, FLOOR, CEILING) if name in sets]
        found = {name: measure.distance(sets[name], sets[BASE]) for name in others}
    if found.get(FLOOR):
        found["ratio"] = found[CONVERTED] / found[FLOOR]
    if REFERENCE in sets:
        drawn = [name for name in DRAWN if name in sets]
        found["to_reference"] = {name: measure.distance(sets[name], sets[REFERENCE]) for name in drawn}
    return found


FORMS = {  # of a figure's name
    "{}": "",
    "{}-difference": ", mean difference from the base",
    "{}-ratio": ", divided by that of the base with other seeds",
    "{}-reference": ", to the reference pictures",
}


def values(table: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The figures that a gate can hold against a limit, by name; see `names`."""
    found: dict[str, float] = {}
    for row in table:
        known = (
            row.get(CONVERTED),
            row.get("difference"),
            row.get("ratio"),
            (row.get("to_reference") or {}).get(CONVERTED),
        )
        named = zip(FORMS, known, strict=True)
        found |= {form.format(row["measure"]): value for form, value in named if value is not None}
    return found


def words(row: Mapping[str, Any]) -> dict[str, str]:
    """Name of each figure of a row -> what it is."""
    return {form.format(row["measure"]): row["label"] + said for form, said in FORMS.items()}


def names(measures: Iterable[Measure], sets: Collection[str]) -> list[str]:
    """The names of `values`, before anything is measured.

    NAME is the mean score of the converted model, or its distance from the base; NAME-difference the mean difference of
    a score from the base's; NAME-ratio the distance divided by the noise floor; NAME-reference the distance from the
    reference pictures.
    """
    found = []
    for measure in measures:
        name, based = measure.name, BASE in sets
        if measure.kind == "score":
            found += [name, *([f"{name}-difference"] if based else [])]
        else:
            found += [name] if based else []
            found += [f"{name}-ratio"] if FLOOR in sets else []
            found += [f"{name}-reference"] if REFERENCE in sets else []
    return found
