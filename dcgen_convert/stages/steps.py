"""The steps of a walk, and what a walk would do: found out before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dcgen_convert.bundle.layout import check_output
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import Found, Run, Stage, Wanted
from dcgen_convert.core.progress import duration
from dcgen_convert.planning.needs import Part, part_of
from dcgen_convert.stages import folders
from dcgen_convert.stages.job import Job

KEEP = 600.0  # seconds of work that are never deleted unless the user said so


@dataclass(frozen=True)
class Step:
    """One stage of the walk.

    Attributes:
        name: of the stage, and of its folder in the run.
        function: does the work.
        inputs: what the result depends on, besides the stages that it builds on.
        after: these stages.
        result, repair: as in `journal.Wanted`.
        continues: (old, new) inputs -> how the stage goes on with a change, in words; None: it starts again.
        extends: going on with a change only adds to the result.
        recorded: as in `journal.Wanted`.
    """

    name: str
    function: Callable[[Job, Stage], None]
    inputs: dict[str, Any]
    after: tuple[str, ...] = ()
    result: tuple[str, ...] = ("*",)
    repair: Literal["file", "entry", "all"] = "entry"
    continues: Callable[[dict[str, Any], dict[str, Any]], str | None] = lambda _old, _new: None
    extends: bool = False
    recorded: Callable[[dict[str, Any]], dict[str, Any]] = lambda old: old


def wanted(step: Step, known: dict[str, Found]) -> Wanted:
    """What a step must be made from, with the results of the stages before it.

    A stage that extends its own result reads what it builds on anew. For the others an extended result counts as the
    one that it extends: what was made from 1,000 pictures still holds when there are 2,000.
    """
    before = {name: known[name].result if step.extends else known[name].origin for name in step.after}
    inputs = {**step.inputs, "before": before} if before else step.inputs
    continues = partial(_continues, step, inputs)
    return Wanted(step.name, inputs, step.result, step.repair, step.extends, continues, step.recorded)


def _continues(step: Step, new: dict[str, Any], old: dict[str, Any]) -> str | None:
    return step.continues(old, new)


class Survey:
    """What a walk would do, found out before anything is changed.

    Args:
        asked: stages that run again whatever stands in their folders.
        lost: others that must run although their folders hold what they should.
        parts: what the stages leave in the run folder.

    Attributes:
        found: what stands in the folder of every stage whose inputs are known already.
        lost: stage -> seconds of its work that would be deleted.
        open: stages that run, or may run because a stage before them does.
        again: stage whose files `clean` has removed -> the stage that must read them now.
        redone: stage of `again` -> seconds of its work.
    """

    def __init__(
        self, run: Run, steps: list[Step], asked: list[str], lost: Collection[str] = (), parts: Collection[Part] = ()
    ) -> None:
        self.run = run
        self.found: dict[str, Found] = {}
        self.lost: dict[str, float] = {}
        self.open: set[str] = {*asked, *lost}
        known: dict[str, Found] = {}
        for step in steps:
            if step.name in asked:
                continue
            if not set(step.after) <= known.keys():
                self.open.add(step.name)
                self.lost[step.name] = run.spent(step.name)
                continue
            found = self.found[step.name] = run.look(wanted(step, known))
            origin = run.origin(step.name)
            if found.state in ("holds", "damaged"):
                known[step.name] = found
            elif step.extends and found.state in ("continues", "interrupted") and origin:
                known[step.name] = Found(found.state, record={"result": origin, "origin": origin})
            if found.state != "holds":
                self.open.add(step.name)
            if found.state in ("outdated", "damaged"):
                self.lost[step.name] = found.seconds
        self.again = self._again(steps, parts)
        self.redone = {name: run.spent(name) for name in self.again}

    def _again(self, steps: list[Step], parts: Collection[Part]) -> dict[str, str]:
        """The stages that hold without the files that a stage which runs must read, and those behind them."""
        again: dict[str, str] = {}
        for step in reversed(steps):
            if step.name in self.open or step.name in again:
                again |= {name: step.name for name in cleaned_for(step.name, self.found, parts) if name not in again}
        return {step.name: again[step.name] for step in steps if step.name in again and step.name not in self.open}

    def require_output(self, output: Path, force: bool) -> None:
        """InputError when a finished bundle, or something else, would be replaced and nobody said so."""
        begun = self.run.path / folders.BUNDLE / folders.BEGUN
        state = self.found[folders.BUNDLE].state if folders.BUNDLE in self.found else ""
        own = state in ("holds", "interrupted", "damaged") and begun.exists()
        if folders.BUNDLE in self.open | self.found.keys() and not own:
            check_output(output, force)

    def require_consent(self, consent: Callable[[str], bool]) -> None:
        """InputError when more than ten minutes of work would be deleted, or done again, and nobody said so."""
        lost = {name: seconds for name, seconds in self.lost.items() if seconds}
        work = {**self.redone, **lost}
        total = sum(work.values())
        if total <= KEEP:
            return
        first = next(step for step in (*self.redone, *lost) if work[step])
        text = "; and ".join(filter(None, (self._deleted(lost), self._redone())))
        if not consent(text):
            raise InputError(text, f"add --from {first} to agree, or use another --run-dir and keep it")

    def _deleted(self, lost: dict[str, float]) -> str:
        if not lost:
            return ""
        states = ("outdated", "damaged")
        reasons = [f"{name} {found.reason}" for name, found in self.found.items() if found.state in states]
        listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in lost.items())
        why = "; ".join(reasons) or "an earlier stage runs"
        return f"{duration(sum(lost.values()))} of work would be deleted ({listed}): {why}"

    def _redone(self) -> str:
        if not self.redone:
            return ""
        listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.redone.items())
        readers = ", ".join(dict.fromkeys(name for name in self.again.values() if name in self.open))
        return (
            f"{duration(sum(self.redone.values()))} of work would be done again ({listed}): clean has removed its "
            f"files, and {readers} must read them"
        )


def cleaned_for(stage: str, found: Mapping[str, Found], parts: Collection[Part]) -> list[str]:
    """The stages whose files ``stage`` must read and `clean` has removed."""
    gone = [part for part in parts if stage in part.readers and part.stage in found]
    return [part.stage for part in gone if any(_is_of(part, name, parts) for name in found[part.stage].cleaned)]


def _is_of(part: Part, output: str, parts: Collection[Part]) -> bool:
    return part_of(parts, part.stage, output) is part
