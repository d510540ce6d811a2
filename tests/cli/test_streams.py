"""stdout carries the result and nothing else, whatever libraries print; with --json errors are documents too."""

import json
import subprocess
import sys

import pytest

from .conftest import environment

NOISY = """
import os, subprocess, sys
from dcgen_convert.cli import app
from dcgen_convert.cli.options import OUTPUT, output_options, stack
import click

@app.cli.command("noisy")
@click.option("--fail", is_flag=True)
@stack(OUTPUT)
@click.pass_obj
def noisy(session, fail, **values):
    console = session.begin(**output_options(values))
    print("python noise")
    os.write(1, b"descriptor noise\\n")
    subprocess.run(["echo", "child noise"])
    console.say("a decision")
    if fail:
        raise RuntimeError("boom")
    console.result({"status": "done"}, "the result")

app.main(sys.argv[1:])
"""


def test_noise_never_reaches_stdout(python):
    done = python(NOISY, "noisy")
    assert done.stdout == "the result\n"
    for noise in ("python noise", "descriptor noise", "child noise", "a decision"):
        assert noise in done.stderr


def test_json_is_exactly_one_document(python):
    done = python(NOISY, "noisy", "--json")
    assert json.loads(done.stdout) == {"status": "done"}


def test_an_internal_error_is_one_document_with_exit_70_and_its_traceback_in_the_log(python, tmp_path):
    log = tmp_path / "log.txt"
    done = python(NOISY, "noisy", "--fail", "--json", "--log-file", str(log))
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 70
    assert error["code"] == "internal"
    assert "boom" in error["message"]
    assert str(log) in error["hint"]
    assert "Traceback" not in done.stderr
    assert "Traceback (most recent call last)" in log.read_text()
    assert "Traceback" in python(NOISY, "noisy", "--fail", "-v").stderr


def test_usage_errors_are_documents_too(cli):
    done = cli("plan", "flux-krea", "--json", "--zero", "9")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "input"


def test_quiet_leaves_only_the_result(python):
    done = python(NOISY, "noisy", "-q")
    assert done.stdout == "the result\n"
    assert "a decision" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [("plan", "flux-krea", "--json", "--disk", "2000"), ("--help",), ("completion", "zsh"), ("plan", "x", "--json")],
)
def test_a_closed_stdout_is_no_error(tmp_path, args):
    command = [sys.executable, "-m", "dcgen_convert.cli", *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment()
    ) as process:
        process.stdout.close()
        stderr = process.stderr.read()
        process.stderr.close()
    assert process.returncode == (2 if "x" in args else 0)
    assert "Traceback" not in stderr
    assert "BrokenPipe" not in stderr
    assert "internal" not in stderr


def test_other_ranks_are_silent(python, tmp_path):
    done = python(NOISY, "noisy", env={"RANK": "1", "WORLD_SIZE": "2"})
    assert done.stdout == ""
    assert "a decision" not in done.stderr


def test_events_are_ndjson(python, tmp_path):
    file = tmp_path / "events.ndjson"
    code = "from dcgen_convert.core.console import Console\nimport sys\nc = Console(events=sys.argv[1])\n"
    code += "with c.progress('work', 20, 'step') as bar:\n    for i in range(20): bar.advance(loss=1 / (i + 1))\n"
    code += "c.warn('careful')"
    python(code, str(file))
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert {event["schema"] for event in events} == {"dcgen.event/1"}
    assert [event["kind"] for event in events][-1] == "warning"
    assert events[-2]["state"] == "done"
    assert events[-2]["done"] == 20


def test_libraries_chatter_only_with_v(python):
    code = NOISY.replace(
        'print("python noise")',
        """
    import warnings, transformers.utils.logging as logging
    from tqdm import tqdm
    list(tqdm(range(3), desc="library bar"))
    warnings.warn("library deprecation", FutureWarning)
    logging.get_logger("transformers").warning("library hint")
""",
    )
    quiet, loud = python(code, "noisy"), python(code, "noisy", "-v")
    for chatter in ("library bar", "library deprecation", "library hint"):
        assert chatter not in quiet.stderr
        assert chatter in loud.stderr
