"""Shared fixtures: the embedded tiny checkpoints, and one short conversion that several tests look at."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import warm
from filelock import FileLock
from warm import environment

from dcgen_convert.cli.app import main

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("any machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; before torch is imported
WEIGHTS = Path(__file__).parent.parent / "dcgen_convert" / "tiny" / "weights"

# The files that take longest, the longest first: one that began last would keep one core busy and the other idle.
LONGEST = (
    "ranks/test_launch.py",
    "conversion/test_convert.py",
    "conversion/test_at_each_stage.py",
    "train/test_train_checkpoints.py",
    "ranks/test_crew.py",
    "families/test_convert_families.py",
    "conversion/test_quantize_verb.py",
    "api/test_api.py",
    "docs/test_docs.py",
    "conversion/test_bad_input.py",
)

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
    "quantize.calibration.batch": 1,  # as two ranks share them
    "quantize.calibration.steps": 2,
    "latents.scale_tolerance": 0.9,  # two denoising steps do not draw the pictures that the scale was measured on
}


STAGES = ("surgery", "data", "latents", "align-embedder", "align-head", "adapt-1", "merge-1", "quantize")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", action="store_true", help="every kind of work on the pretend device, on every family")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would begin with the files that have most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def copy_stages(converted: Path, folder: Path, last: str) -> None:
    """The stages of the shared run, up to ``last``, as a run in ``folder``."""
    for stage in STAGES[: STAGES.index(last) + 1]:
        shutil.copytree(converted / "run" / stage, folder / "run" / stage)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dcgen_convert.cli", *arguments]


def short_settings(**changes: object) -> list[str]:
    return [part for key, value in {**SHORT, **changes}.items() for part in ("--set", f"{key}={value}")]


def start_cli(*arguments: str, cwd: Path) -> subprocess.Popen | warm.WarmProcess:
    """The command in the background, heeding SIGINT even where the test run itself was started with it ignored.

    Where the test has not changed the environment, Python and the large packages are loaded already.
    """
    env = environment()
    if warm.serves(env, arguments):
        return warm.WarmProcess(main, arguments, env, cwd)
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run_cli(*arguments: str, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess:
    """The command, to its end; see `start_cli`."""
    process = start_cli(*arguments, cwd=cwd)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


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
        parts = {"cwd": folder, "env": environment(), "capture_output": True, "text": True, "timeout": 600}
        done = subprocess.run(command(*arguments, *short_settings()), **parts)  # a Python of its own
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == str(folder / "bundle")
        (folder / "whole").touch()
    return folder
