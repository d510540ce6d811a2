"""What a run folder says about its job: recipe.json (what was asked for), asked.json and open.json (what is to do)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dcgen_convert.core import names
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object, understood, write_json
from dcgen_convert.core.journal import Run
from dcgen_convert.core.names import OPEN, RECIPE
from dcgen_convert.core.version import __version__
from dcgen_convert.families.experts import WHOLE, Expert
from dcgen_convert.ranks import join
from dcgen_convert.ranks.machine import Machine
from dcgen_convert.recipe.loading import Resolved, revive

NEW_RUN = "start a new run with another --run-dir"
ASKED = "asked.json"  # the stages that --from asked for and that are still to be begun, and the job that asked
OLDEST = (0, 2)  # version whose runs have the form of today's


def recorded(run_dir: Path) -> tuple[Resolved, Path]:
    """What the run in ``run_dir`` was started with, and its output folder.

    Raises:
        InputError: no run folder, a damaged recipe.json, or a run of a newer version or of one before 0.2.
    """
    path = run_dir / RECIPE
    if not path.is_file():
        raise InputError(f"{run_dir} is not a run folder: it has no {RECIPE}", names.RUN_HINT)
    record = read(path)
    recipe, machine, output = (record.get(key) for key in ("recipe", "machine", "output"))
    known = {field.name for field in fields(Machine)}
    if not isinstance(recipe, dict) or not isinstance(machine, dict) or not isinstance(output, str):
        raise InputError(f"{path} is not what a run writes: recipe, machine or output is missing", NEW_RUN)
    if strange := sorted(machine.keys() - known):
        raise InputError(f"{path} has the unknown machine setting {strange[0]!r}", NEW_RUN)
    with understood(path, NEW_RUN):
        return Resolved(revive(recipe, str(path)), {}, TypeAdapter(Machine).validate_python(machine)), Path(output)


def read(path: Path) -> dict[str, Any]:
    """A run's recipe.json; InputError when it is damaged, or of a version whose runs this one cannot go on with.

    A stage that gives another result than in the version before has a higher number in `depends.VERSIONS`: it alone
    runs again.
    """
    record = read_object(path, NEW_RUN)
    theirs = str(record.get("version"))
    if not OLDEST <= _release(theirs) <= _release(__version__):
        raise InputError(
            f"{path.parent} is a run of dcgen-convert {theirs}, and this is {__version__}, which cannot go on with it",
            f"go on with it in version {theirs}, or {NEW_RUN}",
        )
    return record


def _release(version: str) -> tuple[int, ...]:
    """ "0.2.1" -> (0, 2); () for what is no version."""
    numbers = version.split(".")[:2]
    return tuple(map(int, numbers)) if all(number.isdecimal() for number in numbers) else ()


def write(run: Run, record: dict[str, Any]) -> None:
    """Write a run's recipe.json, with the version of this program."""
    write_json(run.path / RECIPE, {**record, "version": __version__})


def experts(run_dir: Path) -> tuple[Expert, ...]:
    """The networks of a run's model, by their names; the only one in a folder where no run has begun."""
    path = run_dir / RECIPE
    found = read_object(path).get("experts", [WHOLE.name]) if path.is_file() else [WHOLE.name]
    return tuple(Expert(str(name), "") for name in found)


def believed(sizes: Mapping[str, int], before: Mapping[str, tuple[int, str]]) -> dict[str, str]:
    """The recorded hashes of the source's files, where all of them are there and have their ``sizes``; else none."""
    same = sizes == {name: size for name, (size, _) in before.items() if size is not None}
    return {name: digest for name, (_, digest) in before.items()} if same else {}


def asked(run: Run, stages: list[str], start: str | None) -> list[str]:
    """The stages that must run again although they hold. A job that starts again after a crash asks only once."""
    path, job = run.path / ASKED, os.environ.get(join.JOB)
    found = _read_asked(path)
    if start is None or (job and found["job"] == job):
        return [name for name in found["stages"] if name in stages]
    return stages[stages.index(start) :]


def _read_asked(path: Path) -> dict[str, Any]:
    """What ASKED holds; InputError when it is damaged."""
    found = read_object(path) if path.exists() else {"job": None, "stages": []}
    with understood(path, "delete this file, then resume with --from again"):
        return {"job": found["job"], "stages": [str(name) for name in found["stages"]]}


def answered(run: Run, name: str) -> None:
    """Stage ``name`` has begun again."""
    path = run.path / ASKED
    if name in (found := _read_asked(path))["stages"]:
        write_json(path, {**found, "stages": [stage for stage in found["stages"] if stage != name]})


def passed(run: Run, name: str) -> None:
    """Stage ``name`` holds, for the walk of today."""
    found = read_object(run.path / OPEN)["stages"]
    if name in found:
        write_json(run.path / OPEN, {"stages": [stage for stage in found if stage != name]})
