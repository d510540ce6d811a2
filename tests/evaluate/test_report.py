"""The report of a run folder: one self-contained file with every number, curve and picture."""

import base64
import json
import os
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from dcgen_convert.errors import InputError
from dcgen_convert.evaluate.charts import MOST, line_chart, thin
from dcgen_convert.evaluate.report import charts, write_report
from dcgen_convert.files import write_json


class Balanced(HTMLParser):
    """Fails on tags that close in the wrong order; collects what would load from elsewhere."""

    VOID = {"meta", "img", "line", "polyline", "circle"}

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def stage(run, name, metrics, seconds, age):
    (run / name).mkdir(parents=True)
    write_json(run / name / "stage.json", {"stage": name, "metrics": metrics, "seconds": seconds})
    os.utime(run / name / "stage.json", (1000 + age, 1000 + age))
    return run / name


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "tiny <run>"
    stage(run, "data", {"pictures": 64, "broken": ["a.png", "b.png"], "gap": {"after": [1.0, 9.0, 700.0]}}, 3.0, 1)
    align = stage(
        run,
        "align-head",
        {"loss": {"before": 7.43, "after": 1.27}, "gap": {"before": [0.24, 4.88, 345.0], "after": [0.02, 0.37, 12.5]}},
        1.0,
        2,
    )
    lines = [json.dumps({"step": i, "loss": 1 / (i + 1), "lr": 1e-4, "note": "x"}) for i in range(50)]
    (align / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 50, "lo']))
    (align / "captions.jsonl").write_text('{"file": "a.png", "text": "a fox"}\n')
    Image.new("RGB", (4, 4), (255, 0, 0)).save(align / "grid.png")
    write_json(run / "recipe.json", {"name": "tiny", "note": "<b>"})
    return run


def test_holds_everything_and_loads_nothing(run):
    path = write_report(run)
    text = path.read_text()
    page = Balanced()
    page.feed(text)
    assert not page.open and "script" not in page.tags
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert base64.b64decode(page.links[0].split(",")[1]) == (run / "align-head" / "grid.png").read_bytes()
    assert text.index("<h2>data<") < text.index("<h2>align-head<")
    for expected in (
        "<td>loss.after</td><td>1.27</td>",
        "<td>75%</td>",
        "<th>4.0 s</th>",
        "loss, metrics.jsonl",
        "lr, metrics.jsonl",
        "<h3>gap</h3>",
    ):
        assert expected in text, expected
    compared = text[text.index("stages compared") : text.index("<h2>data<")]
    assert "gap.after" in compared and "data</span>" in compared and "align-head</span>" in compared
    assert "gap.before" not in compared and "a.png, b.png" in text
    assert "tiny &lt;run&gt;" in text and "&lt;b&gt;" in text and "<b>" not in text and "captions" not in text


def test_lists_under_one_parent_share_a_chart():
    found = charts({"gap": {"before": [1, 2], "after": [0.5, 1]}, "names": ["a"], "sizes": [1, 2, 3], "empty": []})
    assert found == {
        "sizes": {"sizes": [(0, 1), (1, 2), (2, 3)]},
        "gap": {"before": [(0, 1), (1, 2)], "after": [(0, 0.5), (1, 1)]},
    }


def coordinates(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in re.findall(r'polyline points="([^"]*)"', svg)
    ]


def test_curves_are_drawn_to_scale():
    [line] = coordinates(line_chart({"y": [(0, 0), (5, 5), (10, 10)]}, x_label="x", y_label="y"))
    assert line[1] == pytest.approx(((line[0][0] + line[2][0]) / 2, (line[0][1] + line[2][1]) / 2), abs=0.11)
    assert line[0][1] > line[2][1]  # svg's y points down
    [line] = coordinates(svg := line_chart({"y": [(0, 1), (1, 10), (2, 100)]}, x_label="x", y_label="loss"))
    assert line[1][1] == pytest.approx((line[0][1] + line[2][1]) / 2, abs=0.11) and "loss (log)" in svg


def test_values_that_cannot_be_drawn():
    nan = float("nan")
    svg = line_chart({"ok": [(0, 1), (1, nan), (2, 1)], "bad": [(0, nan)]}, x_label="x", y_label="y")
    assert "nan" not in svg and "bad (no finite values)" in svg and len(coordinates(svg)[0]) == 2
    assert line_chart({"bad": [(0, nan)]}, x_label="x", y_label="y") == "<p>no finite values</p>"
    assert "circle" in line_chart({"one": [(3, 2)]}, x_label="x", y_label="y")


def test_long_curves_are_averaged():
    points = [(i, i % 2) for i in range(MOST * 10)]
    short = thin(points)
    assert len(short) == MOST and all(y == pytest.approx(0.5) for _, y in short)


def test_a_run_without_a_finished_stage(tmp_path, run):
    with pytest.raises(InputError, match="no finished stage"):
        write_report(tmp_path / "nothing")
    (run / "align-head" / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        write_report(run)
