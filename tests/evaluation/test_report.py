"""The report of a run folder: one self-contained file with every number, curve and picture."""

import base64
import json
import os
import re
from html import escape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import write_json
from dcgen_convert.evaluation import words
from dcgen_convert.evaluation.charts import MOST, bar_chart, line_chart, line_file, looks, thin
from dcgen_convert.evaluation.report import charts, finished_stages, scalars, write_report


class Balanced(HTMLParser):
    """Fails on tags that close in the wrong order; collects what would load from elsewhere."""

    VOID = frozenset(("meta", "img", "line", "polyline", "circle"))

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
        '<td title="loss.after">loss.after</td><td>1.27</td>',
        '<td title="pictures">Pictures</td><td>64</td>',
        "<td>75%</td>",
        "<th>4.0 s</th>",
        "Training loss, metrics.jsonl",
        "Learning rate, metrics.jsonl",
        f"<h3>{escape(words.GAP)}</h3>",
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


def test_lines_of_one_kind_share_a_colour_and_the_legend_of_a_file_stays_inside():
    """Names that are the same up to a comma differ in dash; after six kinds the colours come again, dashed."""
    first, other, again, *rest = looks(["flux", "sana", "flux, not aligned", "a", "b", "c", "d", "e"])
    assert first[0] == again[0] != other[0] and first[1] == other[1] == "" != again[1]
    assert len({first, other, again, *rest}) == 8 and rest[-1][0] == first[0]
    names = [f"a rather long name of line {number}" for number in range(9)]
    page = ElementTree.fromstring(line_file({key: [(0, 1), (1, 2)] for key in names}, x_label="x", y_label="y"))
    width, height = int(page.get("width")), int(page.get("height"))
    written = [element for element in page.iter() if element.tag.endswith("}text") and element.text in names]
    places = {text.text: (float(text.get("x")), float(text.get("y"))) for text in written}
    assert sorted(places) == sorted(names) and len(set(places.values())) == 9
    assert all(x + 5 * len(name) < width and y < height for name, (x, y) in places.items())


def test_long_curves_are_averaged():
    points = [(i, i % 2) for i in range(MOST * 10)]
    short = thin(points)
    assert len(short) == MOST and all(y == pytest.approx(0.5) for _, y in short)


def records():
    layers = [
        {
            "module": f"blocks.{i}.to_q",
            "format": "nvfp4",
            "shape": [128, 256],
            "alpha": 0.5,
            "error_rtn": 0.2,
            "error": 0.01 * i,
        }
        for i in range(20)
    ]
    return [*layers, {"module": "blocks.0.norm", "format": "awq_w4a16", "shape": [768, 128], "weight_error": 0.03}]


def test_quantised_layers_are_a_table_and_the_worst_are_bars(tmp_path):
    run = tmp_path / "run"
    stage(run, "quantize", {"format": "nvfp4", "layers": records()}, 2.0, 1)
    text = write_report(run).read_text()
    page = Balanced()
    page.feed(text)
    assert not page.open and "worst 16 of 21 layers" in text and "{" not in text[text.index("<body>") :]
    bars = re.findall(r'<rect [^>]*width="([\d.]+)" [^>]*><title>([^<]*)</title>', text)
    assert [title for _, title in bars][:4] == [
        f"blocks.{i}.to_q, {side}" for i in (19, 18) for side in ("before", "after")
    ]
    widths = {title: float(width) for width, title in bars}
    assert widths["blocks.10.to_q, after"] == pytest.approx(widths["blocks.10.to_q, before"] / 2, abs=0.1)
    for layer in (
        "<td>blocks.0.to_q</td><td>nvfp4</td><td>128 x 256</td><td>0.5</td><td>0.2</td><td>0</td>",
        "awq_w4a16",
    ):
        assert layer in text, layer
    assert '<td title="format">4-bit format</td><td>nvfp4</td>' in text


def test_a_quantised_folder_has_a_report_of_its_layers(tmp_path):
    free = [{"module": "a", "format": "int4", "shape": [128, 128], "weight_error_rtn": 0.2, "weight_error": 0.1}]
    (tmp_path / "bundle" / "transformer").mkdir(parents=True)
    write_json(tmp_path / "bundle" / "transformer" / "quantization.json", {"layers": free})
    text = write_report(tmp_path / "bundle").read_text()
    assert "worst 1 of 1 layers" in text and "relative error of the weight" in text and "a, after" in text


def test_no_bars_are_no_chart_of_nothing():
    assert "<svg" in bar_chart([("a", {"x": 0.0})], "error") and "nan" not in bar_chart([], "error")


def test_a_run_without_a_finished_stage(tmp_path, run):
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path / "nothing")
    (run / "align-head" / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        write_report(run)


def test_the_verdict_and_the_comparison_stand_first_and_timings_last(run):
    assert "Not finished: the last stage that is done is align-head" in write_report(run).read_text()
    folder = stage(run, "verify", {"checks": ["files", "<b>"], "psnr_quantised_db": 25.5}, 2.0, 3)
    Image.new("RGB", (4, 4)).save(folder / "grid.png")
    text = write_report(run).read_text()
    order = ["The bundle passed its checks", "&lt;b&gt;", "the same prompt and", "psnr_quantised_db", "<h2>data</h2>"]
    places = [text.index(part) for part in [*order, "<h2>timings</h2>", "<h2>recipe</h2>"]]
    assert places == sorted(places) and "<b>" not in text


def test_every_figure_of_a_conversion_has_words(converted):
    names = {
        name
        for _, record in finished_stages(converted / "run")
        for name in [*(name for name, _ in scalars(record["metrics"])), *charts(record["metrics"])]
    }
    assert len(names) > 30 and not [name for name in sorted(names) if words.of(name) == name]
    assert words.of("accuracy_round_trip") == f"{words.ACCURACY}: autoencoder alone"
    assert words.of("evaluation.before.t0.31") == "The same loss at noise level 0.31, before the training"
