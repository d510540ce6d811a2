"""Which pictures an instruction in a table is given: the columns are those that data may have."""

from __future__ import annotations

import json

import pytest
import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import edit_prompts, images


@pytest.fixture
def photos(tmp_path):
    for name in "abc":
        pixels = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(ord(name))) * 2 - 1
        images.write(pixels, tmp_path / f"{name}.png")
    return tmp_path


def made(folder, name, text, most=2):
    (folder / name).write_text(text)
    kind = str(folder / name)
    assert edit_prompts.asked_of(0, most, kind, None)  # a model that needs no picture is asked for edits
    edits = edit_prompts.make(kind, None, 2, 0, most=most, folder=folder / "drawn", side=20)
    return {edit.text: [file.name for file in edit.files] for edit in edits}


def test_a_table_names_its_sources_as_published_data_sets_do(photos):
    table = "source_image,source-2,caption\na.png,c.png,make it red\nb.png,,make it blue\n"
    assert made(photos, "rows.csv", table) == {"make it red": ["a.png", "c.png"], "make it blue": ["b.png"]}


def test_a_row_of_a_jsonl_may_have_more_sources_than_the_first(photos):
    rows = [
        {"input_image": "a.png", "caption": "make it red"},
        {"input_image": "b.png", "source-2": "c.png", "caption": "make it blue"},
    ]
    lines = "\n".join(map(json.dumps, rows))
    assert made(photos, "rows.jsonl", lines) == {"make it red": ["a.png"], "make it blue": ["b.png", "c.png"]}
    with pytest.raises(InputError, match=r"row 2 has 2 sources, and the model takes 1"):
        made(photos, "rows.jsonl", lines, most=1)


def test_a_source_that_is_no_name_is_told_with_its_columns(photos):
    rows = '{"source": "a.png", "source-2": 7, "caption": "make it red"}'
    with pytest.raises(InputError, match=r"row 1: source and source-2 must hold names of files, not 7"):
        made(photos, "rows.jsonl", rows)
