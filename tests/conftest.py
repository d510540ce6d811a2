"""Shared fixtures: the embedded tiny checkpoints, and one short conversion that several tests look at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("any machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; before torch is imported
WEIGHTS = Path(__file__).parent.parent / "dcgen_convert" / "tiny" / "weights"

# Short everywhere: enough for every stage to do its real work, not for quality.
SHORT = {
    "data.count": 96,
    "data.steps": 2,
    "align_head.draws": 1,
    "align_head.steps": 4,
    "align_head.batch": 8,
    "adapt.phases.0.steps": 4,
    "adapt.phases.0.batch": 8,
    "bundle.steps": 4,
    "evaluate.prompts": 2,
    "quantize.calibration.prompts": 2,
    "quantize.calibration.steps": 2,
    "latents.scale_tolerance": 0.9,  # two denoising steps do not draw the pictures that the scale was measured on
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dcgen_convert.cli", *arguments]


def short_settings(**changes: object) -> list[str]:
    return [part for key, value in {**SHORT, **changes}.items() for part in ("--set", f"{key}={value}")]


def environment() -> dict[str, str]:
    root = str(WEIGHTS.parents[2])
    return {
        **os.environ,
        "CI": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
    }


def start_cli(*arguments: str, cwd: Path) -> subprocess.Popen:
    """The command in the background, heeding SIGINT even where the test run itself was started with it ignored."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run_cli(*arguments: str, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="session")
def weights() -> Path:
    """Folder of the embedded tiny checkpoints."""
    return WEIGHTS


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """A folder with `bundle` and `run` of a short NVFP4 conversion of tiny-flux, made by the real command.

    The workers of one test run share it: the first one makes it. What a test changes, it changes in a copy.
    """
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "converted"
    with FileLock(f"{folder}.lock"):
        if (folder / "whole").exists():
            return folder
        folder.mkdir(exist_ok=True)
        arguments = [
            "tiny-flux",
            "--ae",
            "tiny-dc-ae-f32",
            "--quantize",
            "nvfp4",
            "-o",
            "bundle",
            "--run-dir",
            "run",
            "-y",
        ]
        done = run_cli(*arguments, *short_settings(), cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == str(folder / "bundle")
        (folder / "whole").touch()
    return folder
