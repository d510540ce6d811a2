"""What a stranger wrote (names, captions, licences, metadata) commands no terminal and forges no line."""

import io
import json
import os

import pytest

from dcgen_convert.core.console import Console
from dcgen_convert.core.spelling import one_line, plain

ESCAPE = "\x1b]0;owned\x07\x1b[2J"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a red fox", "a red fox"),
        ("Bär, 熊\tand\nmore", "Bär, 熊\tand\nmore"),
        (ESCAPE, r"\x1b]0;owned\x07\x1b[2J"),
        ("50 %\rdone", r"50 %\rdone"),
        ("\x9b31m", r"\x9b31m"),
        ("txt.\u202egpj", r"txt.\u202egpj"),
        ("one\u2028two\x85three", r"one\u2028two\x85three"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("B\udcc3\udca4r", "Bär"),  # a UTF-8 name under an ASCII locale
        ("\ud800", r"\ud800"),
        ("\udcff\ud800", r"\xff\ud800"),
    ],
)
def test_spelling(text, shown):
    assert plain(text) == shown
    assert one_line(text) == shown.replace("\n", "\\n").replace("\t", "\\t")


@pytest.mark.parametrize("speak", ["say", "warn", "error", "detail", "last_line", "traceback"])
def test_lines_and_log(tmp_path, speak):
    stream, log = io.StringIO(), tmp_path / "log.txt"
    getattr(Console(log_file=log, verbose=True, stderr=stream), speak)(f"{ESCAPE}\ud800\nerror: forged")
    for text in (stream.getvalue(), log.read_text()):
        assert "\x1b" not in text
        assert r"\x1b]0;owned\x07" in text
    forged = [line for line in log.read_text().splitlines() if line.startswith("error: forged")]
    assert not forged
    assert speak == "traceback" or "\n  error: forged" in stream.getvalue()


def test_a_result_gives_back_the_bytes_of_a_name_and_no_escape():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape")
    Console(stdout=stream).result({}, os.fsdecode(b"runs/caf\xe9") + "\x1b[2J")
    assert raw.getvalue() == b"runs/caf\xe9\\x1b[2J\n"
    raw.truncate(0)
    raw.seek(0)
    Console("json", stdout=stream).result({"title": ESCAPE + "\ud800"}, "")
    assert json.loads(raw.getvalue()) == {"title": ESCAPE + "\ud800"}
    assert b"\x1b" not in raw.getvalue()


def test_a_bar_shows_markup_and_escapes_as_text(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Console(stderr=stream).progress("[red]a[/] \x1b]0;owned\x07", 2) as bar:
        bar.advance(1, picture="[/bold]\n\x07")
        bar._bar.refresh()  # Rich would draw it later
    assert r"[red]a[/] \x1b]0;owned\x07" in stream.getvalue()
    assert r"picture [/bold]\n\x07" in stream.getvalue()
    assert "\x07" not in stream.getvalue()
