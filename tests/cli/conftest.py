"""The real command line in a subprocess: what a shell or a pipeline meets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without anything that changes output, plus `extra`."""
    unwanted = ("NO_COLOR", "FORCE_COLOR", "CI", "RANK", "WORLD_SIZE", "LOCAL_RANK", "HF_TOKEN", "PYTHONPATH")
    quiet = {*unwanted, *warm.OWN}  # a run in this process may have set some
    kept = {key: value for key, value in os.environ.items() if key not in quiet and not key.startswith("DCGEN_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "110", **extra}


@pytest.fixture
def cli(tmp_path):
    """`cli("plan", "flux-krea", env={...})` -> CompletedProcess; runs in an empty folder."""

    def run(*args: str, env: dict[str, str] | None = None, **settings) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "dcgen_convert.cli", *args]
        settings = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path, **settings}
        return subprocess.run(command, env=environment(**(env or {})), **settings)

    return run


@pytest.fixture
def python(tmp_path):
    """`python(code)` -> CompletedProcess of a script with the package on its path."""

    def run(code: str, *args: str, env: dict[str, str] | None = None, **settings) -> subprocess.CompletedProcess:
        settings = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path, **settings}
        return subprocess.run([sys.executable, "-c", code, *args], env=environment(**(env or {})), **settings)

    return run
