"""The HTML report of a run: `dcgen-convert report RUN`.

The report is one file without scripts; pictures and charts are inside it, and it needs no network. It reads the files
that the stages wrote, and knows no stage by name:
    RUN/<stage>/stage.json     metrics and seconds. Numbers become a table. Lists of numbers become charts over their
                               index; lists under one name share a chart (the gap of every block, before and after).
                               Lists of records with a "module" become bars of the worst layers and a table of all.
    RUN/<stage>/**/*.jsonl     one line per step, or per measure of a step: `curves`.
    RUN/<stage>/**/*.png       grids and pictures
"""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from dcgen_convert.core import names
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_write, read_json, read_object, understood
from dcgen_convert.core.journal import CLEANED, MARKER
from dcgen_convert.core.spelling import plain
from dcgen_convert.evaluation import curves, speed, summary, verdicts, words
from dcgen_convert.evaluation.charts import line_chart
from dcgen_convert.evaluation.curves import Series, is_number
from dcgen_convert.evaluation.layers import layer_section

REPORT = "report.html"
VERDICTS = "verdicts"  # key of a stage's metrics: they stand at the head of the page
PICTURES = 8  # per stage; grids first
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
body { color: #222; background: #fff; }
h1, h2, h3 { line-height: 1.2; } h2 { border-top: 1px solid #ccc; padding-top: 1em; margin-top: 2em; }
table { border-collapse: collapse; } td + td { font-variant-numeric: tabular-nums; }
td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top; }
figure { margin: 1em 0; } figcaption { color: #666; font-size: .85em; }
img { max-width: 100%; image-rendering: auto; } svg { width: 100%; max-width: 640px; font: 11px system-ui, sans-serif; }
.rule { stroke: #e4e4e4; } .legend span { margin-right: 1em; }
pre { background: #f5f5f5; padding: .8em; overflow-x: auto; }
"""


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the report of the run folder ``run`` to ``output`` (default: RUN/report.html), and return its path.

    The report of a folder that `quantize` wrote shows its layers.

    Raises:
        InputError: ``run`` is neither a run folder nor a folder that `quantize` wrote.
    """
    run = Path(run)
    begun = (run / names.RECIPE).is_file() or any(run.glob(f"*/{MARKER}"))
    stages = finished_stages(run) if begun else []
    layers = run / "transformer" / names.RECORDS
    if not stages and layers.is_file():
        output = Path(output) if output else run / REPORT
        with understood(layers):
            parts = [f"<h1>{escape(run.name)}</h1>", *layer_section(read_object(layers)["layers"])]
        atomic_write(output, plain(_page(run.name, "\n".join(parts))))
        return output
    if not begun:
        raise InputError(f"{run} is not a run folder: it has no {names.RECIPE}", names.RUN_HINT)
    if not stages:
        raise InputError(f"{run} holds no finished stage", f"dcgen-convert resume {shlex.quote(str(run))}")
    with understood(run, "dcgen-convert resume names the damaged file"):
        trained = [*stages, *_unfinished(run)]
        parts = [f"<h1>{escape(run.name)}</h1>", *_verdict(stages), *_seen(trained), *_compared(stages)]
        for folder, record in trained:
            parts += _stage(folder, record)
        parts += [_timings(stages), *_speed(run)]
    recipe = run / names.RECIPE
    if recipe.is_file():
        parts.append(f"<h2>recipe</h2><pre>{escape(json.dumps(read_json(recipe), indent=2))}</pre>")
    output = Path(output) if output else run / REPORT
    atomic_write(output, plain(_page(run.name, "\n".join(parts))))
    return output


def finished_stages(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, record) of every finished stage, in the order in which they ended."""
    markers = sorted(run.rglob(MARKER), key=lambda path: (path.stat().st_mtime_ns, str(path)))
    again = f"dcgen-convert resume {shlex.quote(str(run))} --from"
    return [(path.parent, read_object(path, f"{again} {path.parent.name} makes the stage again")) for path in markers]


def _unfinished(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The same of a training that is going on, or was cut off: what its files say so far."""
    folders = [path.parent for path in sorted(run.glob(f"*/{names.METRICS}")) if not (path.parent / MARKER).exists()]
    return [
        (
            folder,
            {
                "stage": f"{folder.name}, not finished",
                "metrics": {VERDICTS: [str(verdict) for verdict in verdicts.of(curves.read(folder))]},
            },
        )
        for folder in folders
    ]


def _seen(stages: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """The verdicts on the trainings."""
    told = [
        f"<li>{escape(str(record.get('stage', folder.name)))}: {escape(text)}</li>"
        for folder, record in stages
        for text in (record.get("metrics") or {}).get(VERDICTS) or ()
    ]
    return [f"<h2>seen while it trained</h2><ul>{''.join(told)}</ul>"] if told else []


def _page(title: str, body: str) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def _verdict(stages: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """What a reader asks first: is there a checked bundle, and how do its pictures look beside the base model's?"""
    checked = [(folder, record["metrics"]) for folder, record in stages if (record.get("metrics") or {}).get("checks")]
    if not checked:
        last = stages[-1][1].get("stage", stages[-1][0].name)
        return [f"<p><strong>Not finished: the last stage that is done is {escape(str(last))}.</strong></p>"]
    folder, metrics = checked[-1]
    passed = "".join(f"<li>{escape(words.CHECKS.get(str(name), str(name)))}</li>" for name in metrics["checks"])
    parts = [f"<p><strong>The bundle passed its checks</strong>:</p><ul>{passed}</ul>"]
    for path in sorted(folder.glob("*grid*.png")):
        parts += ["<h2>base model and bundle</h2>", _picture(path, "the same prompt and the same seed in each row")]
    rows = [row for row in scalars(metrics) if row[0] != "checks"]
    parts += [_figures(rows)] if rows else []
    return [*parts, *_evaluated(metrics.get("evaluation")), *_evaluated(_added(folder.parent, summary.STAGE))]


def _evaluated(found: Any) -> list[str]:
    """What the measures of `evaluate` said of base and bundle."""
    if not isinstance(found, Mapping) or not found.get("measures"):
        return []
    base = f"beside {found['base']}" if found.get("base") else "without a base"
    told = f"{found['count']} prompts ({found['prompts']}), {base}"
    return ["<h2>evaluation</h2>", f"<p>{escape(told)}</p>", summary.html(found["measures"])]


def _added(run: Path, verb: str) -> Any:
    """What ``verb`` wrote into the manifest of this run's bundle afterwards; None where it was not run."""
    record = run / names.RECIPE
    output = (read_object(record).get("output") if record.is_file() else None) or run
    manifest = Path(str(output)) / names.MANIFEST
    return (read_object(manifest).get("metrics") or {}).get(verb) if manifest.is_file() else None


def _picture(path: Path, label: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(label)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(label)}</figcaption></figure>"


def _figures(rows: list[tuple[str, Any]]) -> str:
    cells = "".join(
        f'<tr><td title="{escape(name)}">{escape(words.of(name))}</td><td>{escape(_text(value))}</td></tr>'
        for name, value in rows
        if value is not None
    )
    return f"<table>{cells}</table>"


def _speed(run: Path) -> list[str]:
    """What `benchmark` has measured on the bundle of this run; empty where it did not."""
    found = list(speed.rows(_added(run, "benchmark") or {}))
    cells = "".join(f"<tr><td>{escape(what)}</td><td>{escape(value)}</td></tr>" for what, value in found)
    return [f"<h2>speed</h2><table>{cells}</table>"] if found else []


def _timings(stages: list[tuple[Path, dict[str, Any]]]) -> str:
    seconds = [(record.get("stage", folder.name), float(record.get("seconds", 0))) for folder, record in stages]
    total = sum(value for _, value in seconds)
    rows = [
        f"<tr><td>{escape(name)}</td><td>{value:.1f} s</td><td>{value / total if total else 0:.0%}</td></tr>"
        for name, value in seconds
    ]
    return f"<h2>timings</h2><table>{''.join(rows)}<tr><th>all</th><th>{total:.1f} s</th><th></th></tr></table>"


def _compared(stages: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Charts of lists that several stages measured, such as the gap of every block, with one line per stage."""
    found: dict[str, Series] = {}
    for folder, record in stages:
        for name, series in charts(record.get("metrics") or {}).items():
            for line, points in series.items():
                label = name if line == name else f"{name}.{line}"
                found.setdefault(label, {})[record.get("stage", folder.name)] = points
    shared = {name: series for name, series in found.items() if len(series) > 1}
    drawn = [
        f"<h3>{escape(words.of(name))}</h3>{line_chart(series, x_label='index', y_label=name)}"
        for name, series in shared.items()
    ]
    return ["<h2>stages compared</h2>", *drawn] if drawn else []


def _stage(folder: Path, record: Mapping[str, Any]) -> list[str]:
    metrics = {key: value for key, value in (record.get("metrics") or {}).items() if key != VERDICTS}
    parts = [f"<h2>{escape(record.get('stage', folder.name))}</h2>"]
    if rows := scalars(metrics):
        parts.append(_figures(rows))
    for name, series in charts(metrics).items():
        parts += [f"<h3>{escape(words.of(name))}</h3>", line_chart(series, x_label="index", y_label=name)]
    for value in metrics.values():
        if _is_layers(value):
            parts += layer_section(value)
    parts += curves.sections(folder, metrics)
    pictures = sorted(folder.rglob("*.png"), key=lambda path: ("grid" not in path.name, path.as_posix()))
    for path in pictures[:PICTURES]:
        parts.append(_picture(path, path.relative_to(folder).as_posix()))
    if gone := record.get(CLEANED):
        parts.append(f"<p>clean has removed {len(gone)} files of this stage.</p>")
    if len(pictures) > PICTURES:
        parts.append(f"<p>{len(pictures) - PICTURES} more pictures are in the run folder.</p>")
    return parts


def scalars(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Numbers, texts, flags and lists of texts in nested metrics, as (dotted name, value)."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += [] if _is_evaluation(value) else scalars(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            rows.append((prefix + key, value))
        elif not _is_layers(value) and not all(map(is_number, value)):
            rows.append((prefix + key, ", ".join(map(str, value))))
    return rows


def charts(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Series]:
    """Lists of numbers in nested metrics: chart name -> series. Lists under one parent share a chart."""
    own: Series = {
        key: list(enumerate(value))
        for key, value in tree.items()
        if isinstance(value, list) and value and all(map(is_number, value))
    }
    found = {prefix.rstrip(".") or ", ".join(own): own} if own else {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not _is_evaluation(value):
            found |= charts(value, f"{prefix}{key}.")
    return found


def _is_evaluation(value: Mapping[str, Any]) -> bool:
    """Whether it is what the measures said: it has tables of its own."""
    return "measures" in value


def _is_layers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "module" in value[0]


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
