"""The run folder: which stages are done, from what, and whether that still holds.

    run/recipe.json              the resolved recipe
    run/<stage>/...              artefacts, written by the stage
    run/<stage>/stage.json       written last: fingerprint, inputs, metrics, outputs, seconds

A stage is done when its marker has the fingerprint of today's inputs, and every output still has its size. Otherwise it
runs again, and one line says which input changed. A stage that was interrupted continues from its partial files if its
fingerprint is the same. If not, they are deleted, and one line says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.core.files import TEMPORARY, fresh_folder, read_json, write_json
from dcgen_convert.core.names import LOCK

MARKER = "stage.json"
STARTED = "started.json"


def fingerprint(document: Any) -> str:
    """SHA-256 of a JSON document with sorted keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


class Run:
    """One run folder, held by one process at a time."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path = path.resolve()
        self.console = console
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"the run folder {path} is not a folder", "choose another with --run-dir") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run; a second process gets a ResourceError. The lock dies with its process, so it is never stale."""
        with open(self.path / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResourceError(
                    f"another process works in {self.path}", "wait for it, or choose another --run-dir"
                ) from None
            except OSError as error:  # some network file systems know no locks
                raise ResourceError(
                    f"{lock.name} cannot be locked: {error.strerror}", "choose a --run-dir on a local disk"
                ) from error
            yield

    def done(self, name: str, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The marker of stage ``name`` if it holds for ``inputs``, else None (and the reason is said)."""
        folder = self.path / name
        marker = folder / MARKER
        if not marker.exists():
            return None
        record: dict[str, Any] = read_json(marker)
        if record["fingerprint"] != fingerprint(inputs):
            self.console.say(f"{name}: runs again, changed: {_changed(inputs, record['inputs'])}")
            return None
        for relative, size in record["outputs"].items():
            path = folder / relative
            if not path.exists() or path.stat().st_size != size:
                self.console.say(f"{name}: runs again, its output {relative} is missing or cut short")
                return None
        return record

    @contextmanager
    def stage(self, name: str, inputs: dict[str, Any]) -> Iterator[Stage]:
        """Run a stage: yields its folder, writes the marker when the body returns without an exception."""
        folder = self.path / name
        started = folder / STARTED
        current = fingerprint(inputs)
        if not started.exists() or read_json(started)["fingerprint"] != current or (folder / MARKER).exists():
            self._tell_of_loss(name, inputs)
            fresh_folder(folder)
            write_json(started, {"fingerprint": current, "inputs": _plain(inputs)})
        else:
            self.console.say(f"{name}: continues where it stopped")
            for leftover in folder.rglob(f"{TEMPORARY}*"):
                leftover.unlink() if leftover.is_file() else None
        begun = time.time()
        stage = Stage(folder)
        yield stage
        outputs = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (MARKER, STARTED) and not path.name.startswith(TEMPORARY)
        }
        seconds = round(time.time() - begun, 2)
        record = {
            "stage": name,
            "fingerprint": current,
            "inputs": _plain(inputs),
            "metrics": stage.metrics,
            "outputs": outputs,
            "seconds": seconds,
        }
        write_json(folder / MARKER, record)
        os.unlink(started)

    def _tell_of_loss(self, name: str, inputs: dict[str, Any]) -> None:
        """Warn of the partial work of a stage that was cut off with other inputs, before it is deleted."""
        folder = self.path / name
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != STARTED]
        if not files or (folder / MARKER).exists():
            return
        started = folder / STARTED
        recorded = read_json(started).get("inputs") if started.exists() else None
        changed = _changed(inputs, recorded) if recorded else "unknown, an older version did not record the settings"
        newest = max(files, key=lambda path: path.stat().st_mtime).relative_to(folder)
        size = sum(path.stat().st_size for path in files) / 1e6
        self.console.warn(
            f"{name}: starts again, changed: {changed}; its unfinished work is deleted ({len(files)} files, "
            f"{size:.1f} MB, newest {newest})"
        )


class Stage:
    """What a stage's function gets: its folder, and a table for the figures that it reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: dict[str, Any] = {}


def _plain(document: Any) -> Any:
    """A document as JSON gives it back."""
    return json.loads(json.dumps(document, default=str))


def _changed(new: dict[str, Any], old: dict[str, Any]) -> str:
    """Names of what differs between two records of inputs."""
    return ", ".join(sorted("an earlier stage" if key == "before" else key for key in _differing(_plain(new), old)))


def _differing(new: dict[str, Any], old: dict[str, Any]) -> Iterator[str]:
    for key in {*new, *old}:
        mine, other = new.get(key), old.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from (f"{key}.{inner}" for inner in _differing(mine, other))
        elif key not in new or key not in old or mine != other:
            yield key
