"""Ctrl-C leaves with 130 and SIGTERM with 143; the last line is the command that continues."""

import json
import signal
import subprocess
import sys

import pytest

from .conftest import environment

WAIT = """
import sys, time
from pathlib import Path
from dcgen_convert.cli import app
from dcgen_convert.cli.options import OUTPUT, output_options, stack
import click

@app.cli.command("wait")
@click.argument("run")
@stack(OUTPUT)
@click.pass_obj
def wait(session, run, **values):
    console = session.begin(**output_options(values), run_dir=Path(run))
    console.say("waiting")
    time.sleep(60)

app.main(sys.argv[1:])
"""


def heed_interrupts() -> None:
    """A shell starts its background jobs with SIGINT ignored, and children inherit that: undo it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(tmp_path, number: int, *options: str) -> tuple[int, str, str]:
    command = [sys.executable, "-c", WAIT, "wait", str(tmp_path / "run"), *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=tmp_path,
        preexec_fn=heed_interrupts,
    )
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_code_and_resume_command(tmp_path, number, code):
    returned, out, err = interrupted(tmp_path, number)
    assert returned == code
    assert out == ""
    assert err.splitlines()[-1] == f"dcgen-convert resume {tmp_path / 'run'}"
    assert "Traceback" not in err


def test_json_document_names_the_resume_command(tmp_path):
    returned, out, _ = interrupted(tmp_path, signal.SIGTERM, "--json")
    error = json.loads(out)["error"]
    assert returned == 143
    assert error["code"] == "terminated"
    assert error["hint"] == f"dcgen-convert resume {tmp_path / 'run'}"


EARLY = """
import os, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "click":
            for _ in range(2):
                os.kill(os.getpid(), int(sys.argv[-1]))

sys.meta_path.insert(0, Finder())
from dcgen_convert.cli import __main__
__main__.main()
"""
WITHIN_TEXT = """
import os, sys
from dcgen_convert.cli import app

@app.cli.command("text")
def text():
    exec("os.kill(os.getpid(), int(sys.argv[-1]))")

app.main(["text"])
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("script", [EARLY, WITHIN_TEXT], ids=["while the verbs are imported", "in code from a text"])
def test_no_traceback_and_the_code(tmp_path, script, number, code):
    command = [sys.executable, "-c", script, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=60,
                          preexec_fn=heed_interrupts)  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) in (0, 2, 3)
