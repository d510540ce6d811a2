"""Text files of users: UTF-8 with or without a byte order mark, lines end at line feeds, captions are texts."""

import json
import os

import pytest

from dcgen_convert.core import files
from dcgen_convert.core.errors import InputError, explain
from dcgen_convert.data import images, prompts
from dcgen_convert.evaluation import curves
from dcgen_convert.ranks import hosts
from dcgen_convert.recipe import shelf

BOM = b"\xef\xbb\xbf"
SEPARATED = "a fox\u2028in the snow\u0085at\x0bdawn"  # str.splitlines would make four lines of it


@pytest.fixture
def pictured(tmp_path):
    (tmp_path / "a.png").touch()
    return tmp_path


READERS = {
    "a.txt": (lambda text: text, lambda path: images.read_folder(path.parent)[0].caption),
    "p.txt": (lambda text: text, lambda path: prompts.make(str(path), 1, 0)[0]),
    "l.jsonl": (
        lambda text: json.dumps({"file": "a.png", "caption": text}, ensure_ascii=False),
        lambda path: images.read_folder(path)[0].caption,
    ),
    "r.yaml": (lambda text: f'name: "{text}"', lambda path: shelf.read(str(path))[0][1]["name"]),
    "hosts": (lambda text: f"node1 slots=2  # {text}", lambda path: hosts.slots(str(path))),
    "config.json": (lambda text: json.dumps({"a": text}, ensure_ascii=False), files.read_object),
}


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_no_text_and_another_encoding_is_a_sentence_with_the_file(name, pictured):
    write, read = READERS[name]
    path, content = pictured / name, write("Käse").encode()
    path.write_bytes(content)
    plain = read(path)
    path.write_bytes(BOM + content)
    assert read(path) == plain
    for wrong in (write("Käse").encode("latin-1"), write("Käse").encode("utf-16"), content + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(InputError, match=rf"{name} is not UTF-8 text"):
            read(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_line_feeds_end_a_line(end, pictured):
    path = pictured / "p.txt"
    path.write_bytes(f"{SEPARATED}{end}two{end}".encode())
    assert files.read_lines(path) == [SEPARATED, "two"]
    assert sorted(prompts.make(str(path), 2, 0)) == sorted([SEPARATED, "two"])
    lines = [json.dumps({"file": "a.png", "caption": text}, ensure_ascii=False) for text in (SEPARATED, "two")]
    (pictured / "l.jsonl").write_bytes(end.join(lines).encode())
    assert [picture.caption for picture in images.read_folder(pictured / "l.jsonl")] == [SEPARATED, "two"]


def test_an_index_takes_every_caption_back(pictured):
    written = [images.Picture(pictured / "a.png", f"{SEPARATED}\r\n\tand \ufeff more", 1)]
    images.write_index(pictured / images.INDEX, written, pictured)
    assert images.read_index(pictured / images.INDEX, pictured) == written
    assert curves.records(pictured / images.INDEX) == []  # every line is JSON, and none has a step


@pytest.mark.parametrize(
    "record",
    [
        {"file": "a.png", "caption": None},
        {"file": "a.png", "caption": ["a", "b"]},
        {"file": "a.png", "caption": 3},
        {"file": "a.png", "caption": {"en": "x"}},
        {"file": "a.png", "caption": True},
        {"file": "a.png", "caption": "\ud800"},
        {"file": "a.png", "caption": "x", "seed": "7"},
        {"file": "a.png", "caption": "x", "seed": True},
        {"file": None, "caption": "x"},
        {"file": "a.png"},
        {"caption": "x"},
        ["a.png", "x"],
        None,
    ],
)
def test_a_line_that_is_no_picture_with_a_text_is_refused_by_its_number(record, tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"file": "a.png", "caption": "fine"}\n' + json.dumps(record) + "\n")
    with pytest.raises(InputError, match=r"l\.jsonl line 2 cannot be used: "):
        images.read_folder(path)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "nul", '{"a": 1'])
def test_a_damaged_json_file_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match="config.json is not valid JSON"):
        files.read_json(path)


def test_a_pipe_is_no_text_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="is no regular file"):
        files.read_text(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError) as missing:
        files.read_text(tmp_path / "gone")
    assert explain(missing.value).exit_code == 2
