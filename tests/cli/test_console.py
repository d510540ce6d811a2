"""Colour and liveness are decided apart; progress is a bar on a terminal and lines everywhere else."""

import io
import os
import pty
import subprocess
import sys

import pytest

from dcgen_convert.core.console import NULL, Console, wants_colour, wants_live
from dcgen_convert.core.progress import LineProgress, duration

from .conftest import environment


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "env, stream, colour",
    [
        ({}, Terminal(), True),
        ({}, io.StringIO(), False),
        ({"NO_COLOR": "1"}, Terminal(), False),
        ({"FORCE_COLOR": "1"}, io.StringIO(), True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, Terminal(), False),
        ({"FORCE_COLOR": "0"}, Terminal(), False),
        ({"TERM": "dumb"}, Terminal(), False),
    ],
)
def test_colour(env, stream, colour):
    assert wants_colour(stream, env) is colour


@pytest.mark.parametrize(
    "env, stream, live",
    [
        ({}, Terminal(), True),
        ({"FORCE_COLOR": "1"}, io.StringIO(), False),
        ({"CI": "true"}, Terminal(), False),
        ({"CI": "false"}, Terminal(), True),
        ({"TERM": "dumb"}, Terminal(), False),
    ],
)
def test_liveness(env, stream, live):
    assert wants_live(stream, env) is live


def lines_of(steps: int, seconds: float, total: int | None) -> list[str]:
    """Lines of a loop whose every step takes `seconds` on a clock that we move."""
    now = [0.0]
    stream = io.StringIO()
    bar = LineProgress(Console(stderr=stream), "work", total, "step", clock=lambda: now[0])
    with bar:
        for _ in range(steps):
            now[0] += seconds
            bar.advance(1, loss=0.25)
    return stream.getvalue().splitlines()


def test_one_line_per_tenth_with_the_time_left():
    lines = lines_of(200, 0.2, 200)
    assert len(lines) == 10  # nine tenths and the closing line
    assert lines[3] == "work: 40 %  80/200 step  0.2 s each  ETA 24 s  loss 0.25"
    assert lines[-1] == "work: 200 step in 40 s  loss 0.25"


def test_a_short_loop_has_its_closing_line_only():
    assert lines_of(200, 0.01, 200) == ["work: 200 step in 2 s  loss 0.25"]


def test_nothing_done_for_more_than_a_minute_is_no_rate():
    now = [0.0]
    stream = io.StringIO()
    with LineProgress(Console(stderr=stream), "work", 10, "step", clock=lambda: now[0]) as bar:
        now[0] = 70.0
        bar.advance(0)  # what was there before: nothing
        assert not stream.getvalue()
        bar.advance(1)
    assert "10 %  1/10 step  70 s each" in stream.getvalue()


def test_one_line_per_minute_when_tenths_are_slow():
    lines = lines_of(9, 70.0, 100)
    assert len(lines) == 10
    assert "ETA" in lines[0]


def test_unknown_totals_report_each_minute():
    assert len(lines_of(100, 1.0, None)) == 2


def test_a_bar_on_a_terminal_and_none_in_ci():
    assert "\x1b[" in on_a_terminal()
    assert "work: 50 %" not in on_a_terminal()
    plain = on_a_terminal(CI="1", NO_COLOR="1")
    assert plain == "work: 10 items in 0 s\r\n"


def on_a_terminal(**env: str) -> str:
    """What a loop writes to a real pseudo-terminal."""
    code = "from dcgen_convert.core.console import Console\nwith Console().progress('work', 10) as bar:\n"
    code += "    for _ in range(10): bar.advance()"
    reader, writer = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code], stderr=writer, stdin=writer, env=environment(TERM="xterm", **env), check=True
    )
    os.close(writer)
    seen = b""
    try:
        while chunk := os.read(reader, 65536):
            seen += chunk
    except OSError:  # Linux ends a pseudo-terminal with EIO
        os.close(reader)
    return seen.decode()


def test_null_is_silent(capfd):
    NULL.say("x")
    NULL.warn("x")
    NULL.error("x")
    with NULL.progress("work", 2) as bar:
        bar.advance(2)
    NULL.result({}, "x")
    assert capfd.readouterr() == ("", "")


def test_a_reader_that_went_away_does_not_stop_the_work():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    console = Console(stderr=Gone())
    console.say("one")
    console.say("two")


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (59, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (293760, "3.4 days")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
