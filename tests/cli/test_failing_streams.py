"""An error gets out, with its code, when the log, stderr, stdout or the locale fails."""

import errno
import io
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dcgen_convert.cli import session as sessions
from dcgen_convert.cli.session import Session, unwrapped
from dcgen_convert.core.console import Console, Lasting, leave_reader, write_lasting
from dcgen_convert.core.errors import CheckFailed, InternalError, Terminated, explain

from .conftest import environment

FULL = Path("/dev/full")  # every write to it finds no space


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_is_told_once(tmp_path):
    stream = io.StringIO()
    console = Console(log_file=FULL, events=tmp_path / "events.jsonl", stderr=stream)
    console.say("one")
    console.error("the disk is full", "free space")
    assert stream.getvalue().splitlines() == [
        "warning: /dev/full cannot be written: No space left on device",
        "one",
        "error: the disk is full",
        "hint: free space",
    ]
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 1


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_stderr_on_a_full_disk_does_not_stop_the_work():
    with open(FULL, "w") as stream:
        console = Console(stderr=stream, stdout=stream)
        console.say("one")
        console.say("two")
        with pytest.raises(OSError, match="No space"):
            console.result({}, "x")  # this one is the work
        leave_reader(stream)


def test_ascii_streams_show_escapes():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    write_lasting(stream, "Läufe 熊\n")
    assert raw.getvalue() == rb"L\xe4ufe \u718a" + b"\n"


def test_a_closed_stream_is_given_up():
    stream = io.StringIO()
    stream.close()
    Console(stderr=stream).say("x")


def test_whoever_writes_to_stderr_outlives_its_reader():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        lasting = Lasting(stream)
        for _ in range(2):
            lasting.write("x" * 100_000)
            lasting.flush()
        assert os.fstat(writer).st_rdev == os.stat(os.devnull).st_rdev


def during(first, second):
    """``second`` as it is raised while ``first`` is handled."""
    try:
        try:
            raise first
        except BaseException:  # noqa: BLE001
            raise second  # noqa: B904  the missing `from` is what is tested
    except BaseException as exc:  # noqa: BLE001
        return exc


@pytest.mark.parametrize(
    "first, second, code",
    [
        (Terminated(), BrokenPipeError(errno.EPIPE, "Broken pipe"), 143),
        (KeyboardInterrupt(), BrokenPipeError(errno.EPIPE, "Broken pipe"), 130),
        (Terminated(), click.Abort(), 143),
        (KeyboardInterrupt(), RuntimeError("a worker was stopped"), 130),
        (KeyboardInterrupt(), KeyboardInterrupt(), 130),
        (Terminated(), OSError(errno.ENOSPC, "No space left on device"), 4),  # the checkpoint was not written
        (ValueError(), RuntimeError("ours"), 70),
        (ValueError(), CheckFailed("a difference"), 1),
    ],
)
def test_an_interrupt_stays_one(first, second, code):
    assert explain(unwrapped(during(first, second))).exit_code == code


@pytest.fixture
def session(monkeypatch):
    found = Session(["convert", "a name"])
    found.console = Console(stderr=io.StringIO(), stdout=io.StringIO())
    yield found
    found.console.stderr.close()


def test_a_traceback_has_a_file_that_only_the_user_reads(session, tmp_path, monkeypatch):
    monkeypatch.setattr(sessions.tempfile, "tempdir", str(tmp_path))
    assert session.fail(ZeroDivisionError("x")) == 70
    (log,) = tmp_path.iterdir()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert str(os.getpid()) not in log.name
    assert "ZeroDivisionError" in log.read_text()
    assert f"hint: the traceback is in {log}; -v shows it here" in session.console.stderr.getvalue()


def test_no_traceback_file_is_promised_where_none_can_be_written(session, tmp_path, monkeypatch):
    monkeypatch.setattr(sessions.tempfile, "tempdir", str(tmp_path / "none"))
    assert session.fail(ZeroDivisionError("x")) == 70
    assert "hint: run again with -v to see the traceback" in session.console.stderr.getvalue()


def test_an_error_document_that_cannot_be_written_keeps_the_code(session):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    session.json = True
    session.console.mode = "json"
    session.console.result_to(Full())
    assert session.fail(InternalError("x")) == 70


def test_signals_after_the_first_are_heard_until_the_error_is_told(session):
    with pytest.raises(KeyboardInterrupt):
        session._on_signal(signal.SIGINT, None)
    with pytest.raises(Terminated):
        session._on_signal(signal.SIGTERM, None)
    assert session.fail(KeyboardInterrupt()) == 130
    session._on_signal(signal.SIGINT, None)
    session._on_signal(signal.SIGTERM, None)
    assert session.console.stderr.getvalue().splitlines()[-1] == "dcgen-convert convert 'a name'"


def test_an_interrupt_while_the_error_is_told_waits_for_nobody(session, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(session.console, "error", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.fail(Terminated())
    assert session.fail(during(Terminated(), KeyboardInterrupt())) == 130


WORK = """
import os, signal, sys, time
import click
from pathlib import Path
from dcgen_convert.cli import app
from dcgen_convert.cli.options import OUTPUT, output_options, stack

@app.cli.command("work")
@stack(OUTPUT)
@click.pass_obj
def work(session, **values):
    console = session.begin(**output_options(values), run_dir=Path("run"))
    console.say("working")
    sys.stdin.readline()
    try:
        os.kill(os.getpid(), int(sys.argv[-1]))
        time.sleep(9)
    finally:
        print("a library says something", file=sys.stderr, flush=True)
        print("and on stdout", flush=True)
        os.kill(os.getpid(), int(sys.argv[-1]))

app.main(["work"])
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_after_the_reader_of_both_streams_died(tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(int(number))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr.readline() == "working\n"
    process.stderr.close()
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == code
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "network" not in log
    assert "dcgen-convert resume" in log.splitlines()[-1]
