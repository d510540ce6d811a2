"""`doctor --run-dir`: whether the file system of a run folder can do what a run needs, tried with small files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcgen_convert.core.disk import existing
from dcgen_convert.core.files import TEMPORARY, atomic_write, fsync
from dcgen_convert.planning.text import size

LARGE = 2**32 + 1  # bytes: shards of weights and of latents may be larger than 4 GiB
SLOW = 1.0  # seconds for one fsync of a small file and its folder
LOCK_SECONDS = 30
ROOM = 2e9  # bytes that a run of the miniatures has room in

Found = tuple[str, str]


def examine(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Every check by name, as `doctor.examine` has them. Nothing is left behind, not even the folder itself."""
    run_dir = run_dir.expanduser().absolute()
    if taken := [path for path in (run_dir, *run_dir.parents) if path.exists() and not path.is_dir()]:
        return {"run folder": _row("missing", f"{taken[0]} is not a folder: choose another --run-dir")}
    place = existing(run_dir)
    try:
        work = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=place))
    except OSError as error:
        text = f"nothing can be written in {place}: {error.strerror}: choose another --run-dir"
        return {"run folder": _row("missing", text)}
    try:
        found = {name: _tried(check, work, needed) for name, (check, needed) in CHECKS.items()}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"run folder": _row("ok", f"{run_dir}, tried in {place}"), **found}


def _row(state: str, text: str) -> dict[str, Any]:
    return {"state": state, "text": text}


def _tried(check: Callable[[Path], Found], work: Path, needed: str) -> dict[str, Any]:
    """A check; what the system refuses is told with what needs it."""
    try:
        return _row(*check(work))
    except OSError as error:
        return _row("missing", f"refused ({error.strerror}): {needed}")


OTHER = """
import fcntl, sys
with open(sys.argv[1], "w") as lock:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("held")
"""


def _locks(work: Path) -> Found:
    """As a run is locked. Another process tries too: some file systems know locks, but not those of others."""
    import fcntl

    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        command = [sys.executable, "-c", OTHER, lock.name]
        other = subprocess.run(command, capture_output=True, text=True, timeout=LOCK_SECONDS, check=False)
    if other.stdout.strip() != "held":
        return "missing", "a second process does not see the lock: two commands could write into one run folder"
    return "ok", "a second process is kept out"


def _rename(work: Path) -> Found:
    """A file takes the place of another at once, and a folder gets another name."""
    atomic_write(work / "file", "old")
    atomic_write(work / "file", "new")
    (work / "folder").mkdir()
    (work / "folder" / "inside").touch()
    os.replace(work / "folder", work / "moved")
    if (work / "file").read_text() != "new" or not (work / "moved" / "inside").exists():
        return "missing", "a renamed file or folder is not what it was: files could be half written"
    return "ok", "files and folders are replaced at once"


def _flush(work: Path) -> Found:
    start = time.monotonic()
    (work / "flushed").write_bytes(bytes(4096))
    fsync(work / "flushed")
    fsync(work)
    seconds = time.monotonic() - start
    state = "ok" if seconds < SLOW else "limited"
    return state, f"a small file and its folder reach the disk in {1000 * seconds:.0f} ms"


def _links(work: Path) -> Found:
    (work / "linked").write_bytes(b"x")
    (work / "symbolic").symlink_to("linked")
    if (work / "symbolic").read_bytes() != b"x":
        return "missing", "a symbolic link does not lead to its file: folders of pictures are linked"
    try:
        os.link(work / "linked", work / "second")
    except OSError as error:
        return "limited", f"no hard links ({error.strerror}): weights that do not change are copied, which takes space"
    return "ok", "hard and symbolic"


def _large(work: Path) -> Found:
    path = work / "large"
    with open(path, "wb") as file:
        file.seek(LARGE - 1)
        file.write(b"\1")
    stat = path.stat()
    with open(path, "rb") as file:
        file.seek(LARGE - 1)
        whole = stat.st_size == LARGE and file.read() == b"\1"
    path.unlink()
    if not whole:
        return "missing", "a file of more than 4 GiB does not come back whole: shards of weights may be that large"
    return "ok", "more than 4 GiB"


def _free(work: Path) -> Found:
    free = shutil.disk_usage(work).free
    return "ok" if free > ROOM else "limited", f"{size(free)} free; `dcgen-convert plan` says how much a run needs"


CHECKS: dict[str, tuple[Callable[[Path], Found], str]] = {
    "run locks": (_locks, "a run folder is locked, so that no two commands work in it"),
    "run rename": (_rename, "files are written under another name and then renamed"),
    "run fsync": (_flush, "what a stage has made must be on the disk before its marker"),
    "run links": (_links, "several sources of pictures are linked into the run folder"),
    "run file size": (_large, "shards of weights may be larger than 4 GiB"),
    "run space": (_free, "the free space is not known"),
}
