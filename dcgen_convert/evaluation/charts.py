"""Line and bar charts as inline SVG: no script, no library, readable in any browser and in print."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 640, 260  # px
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 44  # px around the plot
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8e5ea2", "#c98b00", "#555555")
DASHES = ("", "6 3", "2 2", "9 3 2 3", "12 4", "1 4")  # lengths of line and gap in px; "": no gaps
LETTER, ROW = 6.2, 16  # px of a letter and of a row in the legend of an SVG file
MOST = 400  # points drawn per line; a longer series is cut into equal pieces, and their means are drawn
FEW = 8  # a line of at most this many points has a mark at each point
STYLE = "text { font: 11px system-ui, sans-serif; } .rule { stroke: #e4e4e4; }"  # of an SVG file
LOG_SPAN = 30.0  # the axis is logarithmic where max / min is above this

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], *, x_label: str, y_label: str) -> str:
    """SVG of one or more named series of (x, y).

    The y axis is logarithmic when all values are positive and max / min is above LOG_SPAN. Points that are not finite
    are left out. The legend says when a series has no finite point. When no series has one, the result is a sentence
    instead of a chart.
    """
    series = finite_points(series)
    drawn = chart_elements(series, x_label, y_label)
    label = f"{escape(y_label)} over {escape(x_label)}"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'
    return svg + _legend(series) if drawn else "<p>no finite values</p>"


def line_file(series: Mapping[str, Points], *, x_label: str, y_label: str) -> str:
    """`line_chart` as an SVG file: the legend is lines of text under the chart. Empty without a point."""
    series = finite_points(series)
    drawn = chart_elements(series, x_label, y_label)
    if not drawn:
        return ""
    legend, x, y = [], float(LEFT), HEIGHT + 10
    for name, (colour, dash) in zip(series, looks(series), strict=True):
        wide = 28 + LETTER * len(name) + 12
        if x > LEFT and x + wide > WIDTH:
            x, y = LEFT, y + ROW
        legend.append(f'<line x1="{x:.0f}" x2="{x + 22:.0f}" y1="{y - 4}" y2="{y - 4}" {_stroke(colour, dash)}/>')
        legend.append(f'<text x="{x + 28:.0f}" y="{y}">{escape(name)}</text>')
        x += wide
    high = y + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" width="{WIDTH}" height="{high}">'
    back = f'<style>{STYLE}</style><rect width="{WIDTH}" height="{high}" fill="#fff"/>'
    return f"{head}{back}{''.join(drawn)}{''.join(legend)}</svg>\n"


def finite_points(series: Mapping[str, Points]) -> dict[str, list[tuple[float, float]]]:
    """The points of each series whose numbers are finite, thinned out."""
    return {
        name: thin([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
        for name, points in series.items()
    }


def chart_elements(series: Mapping[str, Points], x_label: str, y_label: str) -> list[str]:
    """SVG elements of axes, rules and lines; an empty list when there is no point."""
    points = [point for line in series.values() for point in line]
    if not points:
        return []
    xs, ys = [x for x, _ in points], [y for _, y in points]
    log = min(ys) > 0 and max(ys) / min(ys) > LOG_SPAN
    x_axis, y_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, log)
    parts = []
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts += [
        f'<text x="{x_axis(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:.4g}</text>'
        for value in x_axis.ticks()
    ]
    for (name, line), (colour, dash) in zip(series.items(), looks(series), strict=True):
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in line)
        parts.append(
            f'<polyline points="{path}" fill="none" {_stroke(colour, dash)}><title>{escape(name)}</title></polyline>'
        )
        for x, y in line if len(line) <= FEW else ():
            parts.append(f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3" fill="{colour}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}{' (log)' if log else ''}</text>"
    )
    return parts


def bar_chart(rows: Sequence[tuple[str, Mapping[str, float]]], label: str) -> str:
    """SVG of horizontal bars. They begin at zero, and each has its value behind it.

    Args:
        rows: (name, {series: value >= 0}); a row has one thin bar per series. A series has one colour in all rows.
        label: text under the chart.
    """
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    colour_of = {name: colour for name, (colour, _) in zip(names, looks(names), strict=True)}
    top = max((value for _, values in rows for value in values.values()), default=0.0) or 1.0
    left, thick, gap = WIDTH * 0.5, 8, 8  # px
    parts, y = [], 4
    for row, values in rows:
        height = thick * max(len(values), 1)
        parts.append(f'<text x="{left - 6:g}" y="{y + height / 2 + 4:g}" text-anchor="end">{escape(row)}</text>')
        for name, value in values.items():
            width = (WIDTH - 48 - left) * value / top
            parts.append(
                f'<rect x="{left:g}" y="{y}" width="{width:.1f}" height="{thick - 1}" fill="{colour_of[name]}">'
                f"<title>{escape(row)}, {escape(name)}</title></rect>"
                f'<text x="{left + width + 4:.1f}" y="{y + thick - 1}" font-size="8">{value:.3g}</text>'
            )
            y += thick
        y += gap
    svg = f'<svg viewBox="0 0 {WIDTH} {y}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return svg + f"<p>{escape(label)}</p>" + _legend(dict.fromkeys(names, True))


def thin(points: Points) -> list[tuple[float, float]]:
    """At most ``MOST`` points. They are means over equal pieces, so a noisy curve keeps its course."""
    if len(points) <= MOST:
        return list(points)
    edges = [round(i * len(points) / MOST) for i in range(MOST + 1)]
    pieces = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)) for piece in pieces]


class _Axis:
    """Value -> px, linear or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        place = math.log if self.log else float
        part = (place(value) - place(self.low)) / (place(self.high) - place(self.low))
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Four to eight round values. On a logarithmic axis they are powers of ten."""
        if self.log:
            powers = [10.0**k for k in range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)]
            return powers if len(powers) > 1 else [self.low, self.high]
        raw = (self.high - self.low) / 5
        magnitude = 10 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
        first = math.ceil(self.low / step)
        return [round(k * step, 12) for k in range(first, math.floor(self.high / step) + 1)]


def looks(names: Iterable[str]) -> list[tuple[str, str]]:
    """(colour, dash) of each line. Those whose names are the same up to a comma have one colour, and differ in dash."""
    colour_of: dict[str, str] = {}
    drawn: Counter[str] = Counter()
    found = []
    for name in names:
        colour = colour_of.setdefault(name.partition(",")[0], COLOURS[len(colour_of) % len(COLOURS)])
        found.append((colour, DASHES[drawn[colour] % len(DASHES)]))
        drawn[colour] += 1
    return found


def _stroke(colour: str, dash: str) -> str:
    return f'stroke="{colour}" stroke-width="1.6"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _legend(series: Mapping[str, Points | bool]) -> str:
    items = []
    for (name, line), (colour, dash) in zip(series.items(), looks(series), strict=True):
        mark, note = "&#9633;" if dash else "&#9632;", "" if line else " (no finite values)"
        items.append(f'<span style="color:{colour}">{mark} {escape(name)}{note}</span>')
    return f'<p class="legend">{" ".join(items)}</p>'
