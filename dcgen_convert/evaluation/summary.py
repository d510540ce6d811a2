"""The figures of an evaluation as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

from dcgen_convert.evaluation.rows import BASE, CEILING, CONVERTED, FLOOR

FILE = "evaluation.json"
SCHEMA = "dcgen.evaluation/1"
STAGE = "evaluate"  # under which the manifest of a bundle keeps the figures
WIDTH = 118  # columns


def text(document: Mapping[str, Any]) -> str:
    """Two tables, of scores and of distances, and what else the reader must know."""
    scores = [row for row in document["measures"] if row["kind"] == "score"]
    distances = [row for row in document["measures"] if row["kind"] == "distance"]
    parts = []
    if scores:
        columns = {"base": BASE, "converted": CONVERTED, "ceiling": CEILING}
        cells = [
            [*_head(row), *(_number(row.get(key)) for key in columns.values()), _difference(row)] for row in scores
        ]
        parts.append(_table(["score", "better", *columns, "converted - base (95 %)"], cells))
    if any(CONVERTED in row for row in distances):
        columns = {"converted": CONVERTED, "noise floor": FLOOR, "ceiling": CEILING, "ratio": "ratio"}
        cells = [[*_head(row), *(_number(row.get(key)) for key in columns.values())] for row in distances]
        parts.append(_table(["distance to the base", "better", *columns], cells))
    if any("to_reference" in row for row in distances):
        columns = {"base": BASE, "converted": CONVERTED, "ceiling": CEILING}
        cells = [
            [*_head(row), *(_number(row["to_reference"].get(key)) for key in columns.values())] for row in distances
        ]
        parts.append(_table(["distance to the reference", "better", *columns], cells))
    lines = [f"left out: {name} ({reason})" for name, reason in document["left_out"].items()]
    lines += [f"note: {note}" for note in document["notes"]]
    lines += [_gate(gate) for gate in document["gates"]]
    return "\n".join([*parts, *lines, str(document["evaluation"])])


def _head(row: Mapping[str, Any]) -> list[str]:
    return [row["measure"], row["better"]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _difference(row: Mapping[str, Any]) -> str:
    if "difference" not in row:
        return ""
    return f"{row['difference']:+.3g} ({row['low']:+.3g} to {row['high']:+.3g})"


def _gate(gate: Mapping[str, Any]) -> str:
    verdict = "passed" if gate["passed"] else "FAILED"
    return f"gate {verdict}: {gate['name']} {gate['value']:.6g}, {gate['kind']} {gate['limit']:g}"


def _table(head: list[str], cells: list[list[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in cells:
        table.add_row(*row)
    stream = StringIO()
    Console(file=stream, width=WIDTH, no_color=True, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
