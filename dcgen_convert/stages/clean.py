"""What a run folder holds, what still needs it, and the removal of what nothing needs: `dcgen-convert clean`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcgen_convert.core import names
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import CheckFailed
from dcgen_convert.core.files import TEMPORARY, read_object
from dcgen_convert.core.journal import CLEANED, MARKER, Run
from dcgen_convert.planning import needs
from dcgen_convert.planning.needs import Keep, Part
from dcgen_convert.planning.text import size
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages import depends, folders, records

RECORDS = "records: report, card and verify read them"


@dataclass
class Row:
    """One line of the table: files of a run folder that are kept or removed together.

    Attributes:
        stage: that wrote them; "" for files of no stage.
        holds: what they are, in words.
        needed_by: the stages that must still read them.
        use: what they are good for else, in words.
        files: file -> (device, inode, bytes).
        part: of the journal; None: records and leftovers.
        goes: whether they are removed.
    """

    stage: str
    holds: str
    needed_by: list[str] = field(default_factory=list)
    use: str = ""
    files: dict[Path, tuple[int, int, int]] = field(default_factory=dict)
    part: Part | None = None
    goes: bool = False

    def document(self) -> dict[str, Any]:
        total = sum({file[:2]: file[2] for file in self.files.values()}.values())
        told = {"stage": self.stage, "holds": self.holds, "files": len(self.files), "bytes": total}
        return {**told, "needed_by": self.needed_by, "use": self.use, "removed": self.goes}


def look(run: Run, recipe: Recipe, output: Path, keep: Keep) -> list[Row]:
    """What the run folder holds, by part, and what goes with ``keep``. Nothing is changed.

    Args:
        output: folder of the run's bundle. While no finished bundle is there, what it is made from is needed.
    """
    imported = (run.path / "import").exists()
    experts = records.experts(run.path)
    stages, parts = needs.stages(recipe, imported, experts), needs.parts(recipe, imported, experts)
    outputs = {stage: run.record(stage)["outputs"] for stage in finished(run, stages, output)}
    rows: dict[tuple[str, str], Row] = {}
    for path in sorted(run.path.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        stage, name = _place(run.path, path)
        if any(word.startswith(TEMPORARY) for word in path.relative_to(run.path).parts):
            row = Row("", "leftovers of a process that was cut off", goes=True)
        elif stage and stage not in stages:
            row = Row(stage, "a stage that the recipe does not have any more", goes=keep == "bundle")
        elif stage and stage not in outputs:
            row = Row(stage, "work of a stage that is not finished", [stage])
        else:
            part = needs.part_of(parts, stage, name) if stage and name in outputs[stage] else None
            row = _row(part, [*outputs], keep) if part else Row("", RECORDS)
        status = path.lstat()
        kept = rows.setdefault((row.stage, row.holds), row)
        kept.files[path] = (status.st_dev, status.st_ino, status.st_size)
    order = {stage: number for number, stage in enumerate(stages)}
    return sorted(rows.values(), key=lambda row: order.get(row.stage, len(order)))


def finished(run: Run, stages: Iterable[str], output: Path) -> list[str]:
    """The stages whose results hold, as far as the run folder alone tells."""
    path = run.path / names.OPEN
    still = set(read_object(path)["stages"]) if path.exists() else set()
    if not (output / names.MANIFEST).is_file():
        still |= {folders.BUNDLE, folders.VERIFY}
    found = []
    for stage in stages:
        if stage in still or not (run.path / stage / MARKER).exists():
            continue
        try:
            run.record(stage)
        except CheckFailed as error:
            run.console.warn(error.message)
            continue
        found.append(stage)
    return found


def describe(rows: list[Row]) -> dict[str, Any]:
    """bytes: of all. freed: what the disk gets back; data with another name that stays free nothing. parts: rows."""
    sizes = {file[:2]: file[2] for row in rows for file in row.files.values()}
    going = Counter(file[:2] for row in rows if row.goes for file in row.files.values())
    links = {file[:2]: path.lstat().st_nlink for row in rows if row.goes for path, file in row.files.items()}
    freed = sum(sizes[key] for key, count in going.items() if links[key] <= count)
    return {"bytes": sum(sizes.values()), "freed": freed, "parts": [row.document() for row in rows]}


def remove(run: Run, rows: Iterable[Row]) -> None:
    """Remove what goes; the markers of the stages tell it."""
    for row in (row for row in rows if row.goes):
        if row.part:
            run.clean(row.stage, [path.relative_to(run.path / row.stage).as_posix() for path in row.files])
        else:
            for path in row.files:
                path.unlink(missing_ok=True)
            _drop_empty(run.path, row.files)


def retain(run: Run, recipe: Recipe, known: list[Part], done: list[str], console: Console) -> None:
    """Remove what the setting `keep` of the recipe does not keep, now that the stages ``done`` are done."""
    for part in known:
        if not part.removable(done, recipe.keep):
            continue
        record = run.record(part.stage)
        outputs = {
            output: known_as[0]
            for output, known_as in record["outputs"].items()
            if needs.part_of(known, part.stage, output) is part and output not in record.get(CLEANED, ())
        }
        if outputs:
            run.clean(part.stage, outputs)
            console.say(f"{part.stage}: {part.holds} removed, {size(sum(outputs.values()))} (keep is {recipe.keep})")


def _row(part: Part, done: list[str], keep: Keep) -> Row:
    waiting = part.waiting(done)
    return Row(part.stage, part.holds, waiting, part.use, part=part, goes=part.removable(done, keep))


def _place(run: Path, path: Path) -> tuple[str, str]:
    """(stage, path in its folder) of a file; ("", name) of what belongs to no stage."""
    stage, *rest = path.relative_to(run).parts
    known = rest and depends.kind_of(stage) in depends.DEPENDS
    return (stage, "/".join(rest)) if known else ("", "/".join((stage, *rest)))


def _drop_empty(run: Path, files: Iterable[Path]) -> None:
    """Remove the folders that stand empty without ``files``."""
    for folder in sorted({parent for path in files for parent in path.parents if run in parent.parents}, reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            os.rmdir(folder)


def text(document: dict[str, Any]) -> str:
    """The table for people."""
    rows = document["parts"]
    shown = [
        (row["stage"] or "-", size(row["bytes"]), "goes" if row["removed"] else "stays", _why(row)) for row in rows
    ]
    widths = [max([len(line[column]) for line in shown], default=0) for column in range(3)]
    lines = [f"{line[0]:{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:{widths[2]}}  {line[3]}" for line in shown]
    verb = "freed" if document["status"] == "done" else "would be freed"
    return "\n".join([*lines, f"{size(document['freed'])} of {size(document['bytes'])} {verb}"])


def _why(row: dict[str, Any]) -> str:
    if row["needed_by"] == [row["stage"]]:
        return row["holds"]
    if row["needed_by"]:
        return f"{row['holds']}; needed by {', '.join(row['needed_by'])}"
    return f"{row['holds']}; only for {row['use']}" if row["use"] else row["holds"]
