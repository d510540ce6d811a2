"""--from after a crash: what was asked for is done once, however often the ranks start again."""

import os

import pytest

from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import write_json
from dcgen_convert.core.journal import Run
from dcgen_convert.ranks import join
from dcgen_convert.stages import records

NAMES = ["surgery", "data", "latents", "bundle"]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run", NULL)


def asked(run: Run, start: str | None, stages: list[str] = NAMES) -> list[str]:
    """As `convert` does it: find out, then write down."""
    found = records.asked(run, stages, start)
    if found:
        write_json(run.path / records.ASKED, {"job": os.environ.get(join.JOB), "stages": found})
    return found


def test_nothing_is_asked_for_without_from(run):
    assert asked(run, None) == []
    records.answered(run, "data")
    assert asked(run, None) == []


def test_from_asks_for_the_stage_and_those_after_it(run):
    assert asked(run, "data") == ["data", "latents", "bundle"]
    assert asked(run, "data", NAMES[:3]) == ["data", "latents"]


def test_a_job_that_starts_again_asks_for_what_is_left(run, monkeypatch):
    monkeypatch.setenv(join.JOB, "one")
    assert asked(run, "data") == ["data", "latents", "bundle"]
    records.answered(run, "data")
    assert asked(run, "data") == ["latents", "bundle"]  # the same job, after a crash
    assert asked(run, None) == ["latents", "bundle"]  # resume
    monkeypatch.setenv(join.JOB, "two")
    assert asked(run, "data") == ["data", "latents", "bundle"]


def test_each_command_without_ranks_asks_anew(run):
    asked(run, "data")
    records.answered(run, "data")
    assert asked(run, "data") == ["data", "latents", "bundle"]
