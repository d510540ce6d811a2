"""The command, disturbed at a stage of a conversion: a signal in the middle, or a disk that takes no large files."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import warm

LARGEST = 8_000  # bytes of a file on the small disk: log and messages are smaller, what a stage makes is larger


def run_disturbed(stage: str, what: str | int, *arguments: str, cwd: Path) -> CompletedProcess:
    """The command to its end. what: "disk", or the number of the signal that it gets with its first output."""
    process = warm.WarmProcess(partial(main, stage, what), arguments, warm.environment(), cwd)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return CompletedProcess(arguments, process.returncode, out, err)


def main(stage: str, what: str | int) -> None:
    """The command, disturbed as `run_disturbed` says."""
    from dcgen_convert.cli import app

    os.replace = partial(_replace, os.replace, stage, what)
    app.main()


def _replace(really: Callable[..., None], stage: str, what: str | int, source: str, target: str) -> None:
    """os.replace, with which every file of a run gets its name."""
    path = Path(target)
    begins = path.name == "started.json" and path.parent.name == stage
    if isinstance(what, int) and stage in path.parts and not begins:
        os.kill(os.getpid(), what)
    really(source, target)
    if isinstance(what, int) and begins and stage == "verify":  # its outputs come last
        os.kill(os.getpid(), what)
    if what == "disk" and begins:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))
