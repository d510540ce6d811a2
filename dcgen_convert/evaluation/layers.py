"""The quantised layers of a run as HTML: bars of the worst layers, then a table of all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dcgen_convert.evaluation.charts import bar_chart

WORST = 16  # layers drawn
COLUMNS = {  # heading -> key of a layer's record
    "layer": "module",
    "format": "format",
    "out x in": "shape",
    "rank": "rank",
    "smoothing alpha": "alpha",
    "beta": "beta",
    "refits": "refits",
    "output error before": "error_rtn",
    "after": "error",
    "weight error before": "weight_error_rtn",
    "weight after": "weight_error",
}


def layer_section(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """HTML parts that show the error of each layer before and after.

    "Before" is the error if weights and activations are only rounded to the nearest 4-bit values. "After" is the error
    of the layer in the bundle. Both are relative errors of the layer's output, on tokens that no choice was based on.
    Without calibration data only the errors of the weight are known.
    """
    kind = "error" if any("error" in record for record in records) else "weight_error"
    measured = sorted((record for record in records if kind in record), key=lambda record: -record[kind])[:WORST]
    bars = [
        (r["module"], {"before": r[f"{kind}_rtn"], "after": r[kind]} if f"{kind}_rtn" in r else {"after": r[kind]})
        for r in measured
    ]
    label = "relative output error, 4-bit activations included" if kind == "error" else "relative error of the weight"
    return [f"<h3>worst {len(bars)} of {len(records)} layers</h3>", bar_chart(bars, label), _table(records)]


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    columns = {heading: key for heading, key in COLUMNS.items() if any(key in record for record in records)}
    head = "".join(f"<th>{escape(heading)}</th>" for heading in columns)
    rows = ["".join(f"<td>{escape(_text(record.get(key)))}</td>" for key in columns.values()) for record in records]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<details><summary>all layers</summary><table><tr>{head}</tr>{body}</table></details>"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
