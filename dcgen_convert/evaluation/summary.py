"""The figures of an evaluation as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

from dcgen_convert.evaluation.rows import BASE, CEILING, CONVERTED, FLOOR

FILE = "evaluation.json"
SCHEMA = "dcgen.evaluation/1"
STAGE = "evaluate"  # under which the manifest of a bundle keeps the figures
WIDTH = 118  # columns


def text(document: Mapping[str, Any]) -> str:
    """The tables, and what else the reader must know."""
    parts = [_drawn_table(head, cells) for head, cells in tables(document["measures"])]
    lines = [f"left out: {name} ({reason})" for name, reason in document["left_out"].items()]
    lines += [f"note: {note}" for note in document["notes"]]
    lines += [_gate(gate) for gate in document["gates"]]
    return "\n".join([*parts, *lines, str(document["evaluation"])])


def tables(measured: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(head, cells) of each table: scores, distances to the base, and distances to the reference."""
    scores = [row for row in measured if row["kind"] == "score"]
    distances = [row for row in measured if row["kind"] == "distance"]
    sets = {"base": BASE, "converted": CONVERTED, "ceiling": CEILING}
    if scores:
        cells = [[*_head(row), *_numbers(row, sets), _difference(row)] for row in scores]
        yield ["score", "better", *sets, "converted - base (95 %)"], cells
    if any(CONVERTED in row for row in distances):
        columns = {"converted": CONVERTED, "noise floor": FLOOR, "ceiling": CEILING, "ratio": "ratio"}
        yield (
            ["distance to the base", "better", *columns],
            [[*_head(row), *_numbers(row, columns)] for row in distances],
        )
    if any("to_reference" in row for row in distances):
        cells = [[*_head(row), *_numbers(row["to_reference"], sets)] for row in distances]
        yield ["distance to the reference", "better", *sets], cells


def html(measured: Sequence[Mapping[str, Any]]) -> str:
    """The tables as HTML, each measure with its label."""
    labels = {row["measure"]: row["label"] for row in measured}
    parts = []
    for head, cells in tables(measured):
        rows = ["".join(f"<th>{escape(name)}</th>" for name in head)]
        for name, *rest in cells:
            title = f'<td title="{escape(labels[name])}">{escape(labels[name])} ({escape(name)})</td>'
            rows.append(title + "".join(f"<td>{escape(cell)}</td>" for cell in rest))
        parts.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
    return "".join(parts)


def _head(row: Mapping[str, Any]) -> list[str]:
    return [row["measure"], row["better"]]


def _numbers(values: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    return [_number(values.get(key)) for key in columns.values()]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _difference(row: Mapping[str, Any]) -> str:
    if "difference" not in row:
        return ""
    left = f", {row['pairs']} of {row['pairs'] + row['dropped']} pairs" if row.get("dropped") else ""
    return f"{row['difference']:+.3g} ({row['low']:+.3g} to {row['high']:+.3g}){left}"


def _gate(gate: Mapping[str, Any]) -> str:
    verdict = "passed" if gate["passed"] else "FAILED"
    return f"gate {verdict}: {gate['name']} {gate['value']:.6g}, {gate['kind']} {gate['limit']:g}"


def _drawn_table(head: list[str], cells: list[list[str]]) -> str:
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
