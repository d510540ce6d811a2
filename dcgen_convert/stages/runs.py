"""The run folders under a folder: the state, the size and the age of each. Nothing is changed."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import Any

from dcgen_convert.core import names
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import MARKER
from dcgen_convert.stages.folders import VERIFY


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """The runs in ``folder``, or ``folder`` itself when it is one: path, state, stages, bytes, age [s]; oldest first.

    state: "running" (a process holds it), "finished" (the bundle was verified), "stopped". stages: those that are done,
    in the order in which they ended. Files that are links to the same data count once.

    Raises:
        InputError: ``folder`` is no folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", "give the folder that holds the run folders, such as ./runs")
    found = [path for path in (folder, *sorted(folder.iterdir())) if (path / names.RECIPE).is_file()]
    return sorted((_run(path) for path in found), key=lambda run: -run["age"])


def _run(path: Path) -> dict[str, Any]:
    markers = sorted(path.glob(f"*/{MARKER}"), key=lambda marker: marker.stat().st_mtime_ns)
    stages = [marker.parent.name for marker in markers]
    state = "running" if _is_held(path / "lock") else "finished" if VERIFY in stages else "stopped"
    sizes, newest = {}, 0.0
    for file in path.rglob("*"):
        status = file.lstat()
        if not file.is_dir():
            sizes[status.st_dev, status.st_ino] = status.st_size
            newest = max(newest, status.st_mtime)
    age = round(max(0.0, time.time() - newest), 1)
    return {"run": str(path), "state": state, "stages": stages, "bytes": sum(sizes.values()), "age": age}


def _is_held(lock: Path) -> bool:
    """Whether a process holds the run's lock; it is taken for a moment to find out."""
    if not lock.is_file():
        return False
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
