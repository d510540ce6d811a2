"""The run folder: which stages are done, from what, and whether that still holds.

    run/recipe.json              the resolved recipe
    run/<stage>/...              artefacts, written by the stage
    run/<stage>/started.json     while the stage is unfinished: what it is made from, and the seconds spent so far
    run/<stage>/stage.json       written last: what it was made from, metrics, and the SHA-256 of every output

A stage holds when its marker names today's inputs and every output still has its hash. Part of the inputs are the
*results* of the stages before it: when one of these ran again and came out equal, the stage still holds. A stage with
damaged outputs makes only these again. A stage that was interrupted continues from its partial files. A stage whose
inputs changed starts again, unless it says that it can continue from what it has (`Wanted.continues`).

A stage may lose outputs on purpose (`Run.clean`): its marker names them, and it still holds. Whoever must read them
again has to ask for the stage to run anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import CheckFailed, InputError, ResourceError
from dcgen_convert.core.files import TEMPORARY, fresh_folder, hashes, read_object, sealed, understood, write_json
from dcgen_convert.core.names import CHECKPOINTS, LOCK

MARKER = "stage.json"
STARTED = "started.json"
CLEANED = "cleaned"  # key of the marker: outputs that `clean` has removed
SEAL = "seal"  # key of the marker: fingerprint of what stands beside it
TIMES = ("seconds", "begun", "spent")  # keys that the seal does not cover, nor PEAK
PEAK = "peak"  # key of the marker: highest memory of the stage, bytes of "host" and "gpu"
LONG_READ = 10_000_000_000  # bytes whose check takes long enough to be announced


def fingerprint(document: Any) -> str:
    """SHA-256 of a JSON document with sorted keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Wanted:
    """What a stage must be made from today.

    Attributes:
        name: of the stage, and of its folder.
        inputs: all that its result depends on, results of earlier stages included (key "before").
        result: patterns of the outputs that later stages read; the others are notes.
        repair: what a damaged output costs: "file" (the stage makes single files again), "entry" (what stands in the
            stage's folder and holds it), "all" (the stage starts again).
        extends: a stage that continues with other inputs only adds to its result: what builds on it still holds.
        recorded: the inputs of a marker -> the same by today's names, where an earlier version used others.
        continues: the inputs that the work in the folder was made from -> how it goes on with today's, in words; None
            if it cannot.
    """

    name: str
    inputs: dict[str, Any]
    result: tuple[str, ...] = ("*",)
    repair: Literal["file", "entry", "all"] = "entry"
    extends: bool = False
    continues: Callable[[dict[str, Any]], str | None] = lambda _: None
    recorded: Callable[[dict[str, Any]], dict[str, Any]] = lambda old: old

    def reads(self, output: str) -> bool:
        """Whether later stages read this output."""
        return any(fnmatch(output, pattern) for pattern in self.result)


@dataclass(frozen=True)
class Found:
    """What stands in a stage's folder.

    Attributes:
        state: "holds", "damaged" (outputs), "interrupted", "continues" (with other inputs), "outdated", "nothing".
        reason: why it does not hold, in words.
        seconds: of work that is lost if the stage starts again; 0 where single outputs can be made again.
        record: the marker, if there is one.
        damaged: outputs that are missing or changed.
    """

    state: str
    reason: str = ""
    seconds: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()

    @property
    def cleaned(self) -> tuple[str, ...]:
        """Outputs that `clean` has removed."""
        return tuple(self.record.get(CLEANED, ()))

    @property
    def result(self) -> str:
        """Fingerprint of what later stages read of the stage."""
        return str(self.record["result"])

    @property
    def origin(self) -> str:
        """Fingerprint of the result that this one extends, or of this one."""
        return str(self.record["origin"])


class Run:
    """One run folder, held by one process at a time.

    Args:
        check: compare the hash of every output of a finished stage, once; else only its size.
        option: that names the folder, for the messages.
    """

    def __init__(self, path: Path, console: Console, check: bool = True, option: str = "--run-dir") -> None:
        self.path = path.resolve()
        self.option = option
        self.console = console
        self._check = check
        self._checked: dict[str, tuple[str, ...]] = {}  # seal of a marker -> its damaged outputs
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"the run folder {path} is not a folder", f"choose another with {self.option}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run; a second process gets a ResourceError. The lock dies with its process, so it is never stale."""
        with open(self.path / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResourceError(
                    f"another process works in {self.path}", f"wait for it, or choose another {self.option}"
                ) from None
            except OSError as error:  # some network file systems know no locks
                raise ResourceError(
                    f"{lock.name} cannot be locked: {error.strerror}", f"choose a {self.option} on a local disk"
                ) from error
            yield

    def look(self, wanted: Wanted) -> Found:
        """What stands in the folder of a stage. Nothing is changed."""
        folder = self.path / wanted.name
        inputs = _plain(wanted.inputs)
        if (folder / MARKER).exists():
            record = self.record(wanted.name)
            damaged = tuple(filter(wanted.reads, self._damage(wanted.name, record)))
            if (old := wanted.recorded(record["inputs"])) == inputs:
                if not damaged:
                    return Found("holds", record=record)
                lost = record["seconds"] if record.get(CLEANED) else 0  # what it could be repaired from may be gone
                return Found("damaged", f"{damaged[0]} {_state(folder / damaged[0])}", lost, record, damaged)
            return self._changed(wanted, old, record["seconds"], record, damaged)
        if not (folder / STARTED).exists():
            left = any(folder.rglob("*")) if folder.exists() else False
            return Found("outdated", "unknown, it has no record of its inputs") if left else Found("nothing")
        started = self._sealed(wanted.name, STARTED)
        if (old := wanted.recorded(started["inputs"])) == inputs:
            return Found("interrupted", seconds=_spent(folder, started))
        return self._changed(wanted, old, _spent(folder, started), {}, ())

    def spent(self, name: str) -> float:
        """Seconds of work in the folder of a stage."""
        folder = self.path / name
        if (folder / MARKER).exists():
            return float(self.record(name)["seconds"])
        return _spent(folder, self._sealed(name, STARTED)) if (folder / STARTED).exists() else 0.0

    def origin(self, name: str) -> str | None:
        """Fingerprint of the result that a stage has, or extends; None without one."""
        folder = self.path / name
        if (folder / MARKER).exists():
            return str(self.record(name)["origin"])
        return self._sealed(name, STARTED)["origin"] if (folder / STARTED).exists() else None

    def inputs(self, name: str) -> dict[str, Any]:
        """What the work in the folder of a stage is made from; empty where there is none."""
        for file in (MARKER, STARTED):
            if (self.path / name / file).exists():
                found: dict[str, Any] = self._sealed(name, file)["inputs"]
                return found
        return {}

    def record(self, name: str) -> dict[str, Any]:
        """The marker of a finished stage.

        Raises:
            CheckFailed: it is damaged.
        """
        return self._sealed(name, MARKER)

    def _sealed(self, name: str, file: str) -> dict[str, Any]:
        """A record of a stage, with its times as numbers; CheckFailed when it is not what the stage wrote."""
        path, hint = self.path / name / file, f"--from {name} makes the stage again"
        try:
            record = read_object(path)
            with understood(path):
                found = [key for key in TIMES if key in record or (key, file) == ("seconds", MARKER)]
                times = {key: max(0.0, float(record[key])) for key in found}
        except InputError as error:
            raise CheckFailed(error.message, hint) from error
        if record.get(SEAL) != _seal(record):
            raise CheckFailed(f"{path} is damaged: it is not what the stage wrote", hint)
        return {**record, **times}

    @contextmanager
    def stage(self, wanted: Wanted, found: Found, again: bool = False) -> Iterator[Stage]:
        """Run a stage: yields its folder, writes the marker when the body returns without an exception.

        Args:
            found: what stands in the folder now.
            again: start again, whatever stands there.
        """
        folder = self.path / wanted.name
        whole = wanted.repair == "all" or found.cleaned
        fresh = again or found.state in ("outdated", "nothing") or (found.state == "damaged" and whole)
        before = {} if fresh else self._before(folder, found)
        if fresh:
            fresh_folder(folder)
        else:
            self._tidy(wanted, found)
        history, spent = [*before.get("history", [])], float(before.get("spent") or 0)
        if found.state == "continues" and not fresh:
            history.append(found.reason)
        origin = before.get("origin") if wanted.extends or found.state == "damaged" else None
        former = found.record if fresh else {}
        started = {
            "inputs": _plain(wanted.inputs),
            "begun": time.time(),
            "spent": spent,
            "history": history,
            "origin": origin,
        }
        write_json(folder / STARTED, {**started, SEAL: _seal(started)})
        (folder / MARKER).unlink(missing_ok=True)
        stage = Stage(folder)
        yield stage
        files = [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (MARKER, STARTED) and not path.name.startswith(TEMPORARY)
        ]
        outputs = {
            str(path.relative_to(folder)): [path.stat().st_size, digest]
            for path, digest in zip(files, hashes(files), strict=True)
        }
        result = fingerprint({name: value for name, value in outputs.items() if wanted.reads(name)})
        if former.get("result") == result:
            origin = former["origin"]  # made again and equal: what was made from it still holds
        record = {
            "stage": wanted.name,
            "inputs": started["inputs"],
            "metrics": _plain({**({"history": history} if history else {}), **stage.metrics}),
            "outputs": outputs,
            "result": result,
            "origin": origin or result,
            "history": history,
            "seconds": round(spent + time.time() - started["begun"], 2),
            PEAK: stage.peak,
        }
        self._checked[_seal(record)] = ()
        write_json(folder / MARKER, {**record, SEAL: _seal(record)})
        os.unlink(folder / STARTED)

    def clean(self, name: str, outputs: Iterable[str]) -> None:
        """Remove outputs of a finished stage for good; its marker names them first, so that nobody misses them."""
        folder, record = self.path / name, self.record(name)
        gone = sorted({*record.get(CLEANED, ()), *outputs})
        marker, ended = folder / MARKER, (folder / MARKER).stat()
        cleaned = {**record, CLEANED: gone}
        cleaned[SEAL] = _seal(cleaned)
        if record[SEAL] in self._checked:
            self._checked[cleaned[SEAL]] = tuple(set(self._checked[record[SEAL]]) - {*gone})
        write_json(marker, cleaned)
        os.utime(marker, ns=(ended.st_atime_ns, ended.st_mtime_ns))  # it tells when the stage ended
        for path in (folder / output for output in gone):
            path.unlink(missing_ok=True)
            for parent in path.relative_to(folder).parents:
                if parent.name and (folder / parent).is_dir() and not any((folder / parent).iterdir()):
                    (folder / parent).rmdir()

    def _before(self, folder: Path, found: Found) -> dict[str, Any]:
        """What is known of the work that the stage continues: seconds spent, history, origin."""
        if found.record:
            return {**found.record, "spent": found.record["seconds"]}
        started = self._sealed(folder.name, STARTED)
        return {**started, "spent": _spent(folder, started)}

    def _tidy(self, wanted: Wanted, found: Found) -> None:
        """Remove what is damaged or unfinished from the folder that a stage continues in."""
        folder = self.path / wanted.name
        for name in found.damaged:
            _remove(folder / (name if wanted.repair == "file" else Path(name).parts[0]))
        for leftover in [*folder.rglob(f"{TEMPORARY}*")]:
            _remove(leftover)
        if found.record:
            return  # its files were checked
        for file in folder.rglob("*.safetensors"):
            if CHECKPOINTS not in file.parts and not sealed(file):  # a training checks its own
                self.console.warn(f"{file} is damaged: it is made again")
                file.unlink()

    def _changed(
        self, wanted: Wanted, old: dict[str, Any], seconds: float, record: dict[str, Any], damaged: tuple[str, ...]
    ) -> Found:
        """What stands there was made from other inputs."""
        gone = "; clean has removed what it could go on from" if record.get(CLEANED) else ""
        continued = None if gone else wanted.continues(old)
        if continued is not None:
            return Found("continues", continued, 0, record, damaged)
        return Found("outdated", f"changed: {_names(wanted.inputs, old)}{gone}", seconds, record)

    def _damage(self, name: str, record: dict[str, Any]) -> tuple[str, ...]:
        """Outputs of a finished stage that are missing or not what the stage wrote. Told once."""
        seal = record[SEAL]
        if seal not in self._checked:
            folder, outputs = self.path / name, record["outputs"]
            total = sum(size for path, (size, _) in outputs.items() if path not in record.get(CLEANED, ()))
            if self._check and total > LONG_READ:
                self.console.say(f"{name}: checking {total / 1e9:.1f} GB (--no-check leaves it out)")
            kept = [output for output in outputs if output not in record.get(CLEANED, ())]
            there = {output for output in kept if _size(folder / output) == outputs[output][0]}
            if self._check:
                read = [output for output in kept if output in there]
                digests = zip(read, hashes(folder / output for output in read), strict=True)
                there = {output for output, digest in digests if digest == outputs[output][1]}
            found = tuple(output for output in kept if output not in there)
            for output in found:
                self.console.warn(f"{folder / output} {_state(folder / output)}")
            self._checked[seal] = found
        return self._checked[seal]


class Stage:
    """What a stage's function gets: its folder, and a table for the figures that it reports. peak: bytes of memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: dict[str, Any] = {}
        self.peak: dict[str, int] = {}


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    return path.stat().st_size if path.is_file() else None


def removed(run: Path) -> list[tuple[Path, int]]:
    """(path, bytes) of every output that `clean` has removed from a run folder."""
    found = []
    for marker in sorted(run.glob(f"*/{MARKER}")):
        try:
            record = read_object(marker)
        except InputError:
            continue  # `Run.look` says so, with the command that helps
        if record.get(SEAL) == _seal(record):
            found += [(marker.parent / name, int(record["outputs"][name][0])) for name in record.get(CLEANED, ())]
    return found


def _plain(document: Any) -> Any:
    """A document as JSON gives it back."""
    return json.loads(json.dumps(document, default=str))


def _seal(record: dict[str, Any]) -> str:
    return fingerprint({key: value for key, value in record.items() if key not in (SEAL, PEAK, *TIMES)})


def cleaned_stage(folder: Path) -> Path | None:
    """The stage of a run whose files in ``folder`` `clean` has removed; None for any other folder."""
    for stage in (folder, folder.parent):
        if (stage / MARKER).is_file():
            gone = [stage / name for name in read_object(stage / MARKER).get(CLEANED, ())]
            return stage if any(folder in path.parents for path in gone) else None
    return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _spent(folder: Path, started: dict[str, Any]) -> float:
    """Seconds of work in an unfinished stage: up to its newest file."""
    begun = float(started.get("begun") or 0)
    newest = max((path.stat().st_mtime for path in folder.rglob("*") if path.is_file()), default=begun)
    return float(started.get("spent") or 0) + max(0.0, newest - begun)


def _state(path: Path) -> str:
    return "is not what the stage wrote" if path.exists() else "is missing"


def _names(new: dict[str, Any], old: dict[str, Any]) -> str:
    """Names of what differs between two records of inputs."""
    return ", ".join("an earlier stage" if name == "before" else name for name in differing(new, old))


def differing(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """Names of what differs between two records of inputs, with dots between the levels; sorted."""
    return sorted(_differing(_plain(new), old))


def _differing(new: dict[str, Any], old: dict[str, Any]) -> Iterator[str]:
    for key in {*new, *old}:
        mine, other = new.get(key), old.get(key)
        if isinstance(mine, dict) and isinstance(other, dict) and key != "before":
            yield from (f"{key}.{inner}" for inner in _differing(mine, other))
        elif key not in new or key not in old or mine != other:
            yield key
