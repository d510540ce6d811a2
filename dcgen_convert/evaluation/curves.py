"""The curves of a training, read from the files that it writes: what the report draws, and what the verdicts read.

FOLDER/metrics.jsonl           "loss" of every step, with "grad_norm", "lr" and more
FOLDER/evaluation-before.json  "mean": the loss on pictures that were kept apart, before the first step; "nothing":
                               that of a model that always answers zero
FOLDER/evaluations.jsonl       "mean" after a "step", and the same by noise level, "t0.31"
FOLDER/measures.jsonl          a line per measure of a sample grid, see `previews`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_lines, read_object
from dcgen_convert.core.names import BEFORE, EVALUATIONS, MEASURES
from dcgen_convert.evaluation import words
from dcgen_convert.evaluation.charts import line_chart

Points = list[tuple[float, float]]
Series = dict[str, Points]  # name of a line in a chart -> its points (x, y)
COLUMNS = ("loss", "grad_norm", "lr")  # columns drawn, in this order, where a step file has them
KEPT_APART = "pictures that were kept apart"
COLUMNS_OF_MEASURE = {  # column -> what its line is called
    "value": "this model",
    "round_trip": "round trip",
    "other_prompts": "with the captions of other pictures",
}


@dataclass(frozen=True)
class Curves:
    """What is known of a training so far.

    Attributes:
        held_out: (step, loss) on pictures that were kept apart, from step 0 on.
        nothing: the held-out loss of a model that always answers zero; None: not known.
        measures: name -> its lines of measures.jsonl, in the order of their steps.
    """

    held_out: Points = field(default_factory=list)
    nothing: float | None = None
    measures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def read(folder: Path, metrics: Mapping[str, Any] | None = None) -> Curves:
    """The curves of the training in ``folder``; empty ones where a file is not there.

    Args:
        metrics: of the phase, where it is done: they know the held-out loss after the last step.
    """
    before = read_object(folder / BEFORE) if (folder / BEFORE).exists() else {}
    held_out = [(0.0, float(before["mean"]))] if "mean" in before else []
    held_out += points(records(folder / EVALUATIONS), "mean")
    known = metrics or {}
    after, steps = (known.get("evaluation") or {}).get("after") or {}, float(known.get("steps") or 0)
    if held_out and "mean" in after and held_out[-1][0] < steps:
        held_out.append((steps, after["mean"]))
    return Curves(held_out, before.get("nothing"), _by_measure(records(folder / MEASURES)))


def _by_measure(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_name.setdefault(str(line.get("measure")), []).append(line)
    return by_name


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines that have a step; none without a file.

    A last line that a crash cut off is left out; InputError for another one that is no JSON.
    """
    lines, found = read_lines(path) if path.exists() else [], []
    for i, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if i + 1 < len(lines):
                raise InputError(f"{path} line {i + 1} is not JSON", "remove the line") from None
    return [one for one in found if isinstance(one, dict) and is_number(one.get("step"))]


def points(lines: list[dict[str, Any]], column: str) -> Points:
    """(step, value) of the lines that have a number in ``column``."""
    return [(line["step"], line[column]) for line in lines if is_number(line.get(column))]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sections(folder: Path, metrics: Mapping[str, Any]) -> list[str]:
    """Charts of every step file in the folder of a stage, as HTML. metrics: of the stage."""
    parts = []
    for path in sorted(folder.rglob("*.jsonl")):
        name = path.relative_to(folder).as_posix()
        for title, series, label in _charts(path, metrics):
            chart = line_chart(series, x_label="step", y_label=label)
            parts += [f"<h3>{escape(title)}, {escape(name)}</h3>", chart]
    return parts


def _charts(path: Path, metrics: Mapping[str, Any]) -> Iterator[tuple[str, Series, str]]:
    """(title, lines, label of the y axis) of each chart of a step file; nothing for another kind of jsonl."""
    lines = records(path)
    if path.name == MEASURES:
        for name, measured in _by_measure(lines).items():
            columns = {label: points(measured, column) for column, label in COLUMNS_OF_MEASURE.items()}
            yield f"{name} of the sample grids", {label: line for label, line in columns.items() if line}, name
            if ratio := points(measured, "ratio"):
                yield f"{name} of the sample grids, divided by that of two halves of the round trips", {name: ratio}, ""
        return
    if path.name == EVALUATIONS:
        levels = {name: points(lines, name) for name in dict.fromkeys(key for line in lines for key in line)}
        levels = {f"noise level {name[1:]}": line for name, line in levels.items() if name[:1] == "t" and line}
        if levels:
            yield f"Loss on {KEPT_APART}, by noise level", levels, "loss"
        return
    for column in COLUMNS:
        if own := points(lines, column):
            label = words.of(column).lower()
            apart = read(path.parent, metrics).held_out if column == "loss" else []
            yield words.of(column), {label: own, **({KEPT_APART: apart} if apart else {})}, label
