"""How well a rehearsal foretells a run: seconds and memory of every stage, predicted and measured.

    python tests/benchmarks/rehearsal.py [RECIPE, tiny-flux] [FORMAT, nvfp4] [FOLDER, a temporary one]

First a rehearsal as it comes. From its file `plan --measured` predicts a second rehearsal with other numbers of
pictures and steps, and the whole conversion. Both are then run. A stage of less than SHORT seconds is a matter of
starting up, and is shown without being judged. Run it on a quiet machine.

Bars, stage by stage: time within a factor 1.5, memory within 20 %; no stage above 2 % of the total is missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

FACTOR, SHARE, SHORT, GIB = 1.5, 0.20, 5.0, 2**30


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    """The document that the command prints."""
    line = [sys.executable, "-m", "dcgen_convert.cli", *arguments, "--json", "-q"]
    done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, check=False)
    document: dict[str, Any] = json.loads(done.stdout)
    if "error" in document:
        raise SystemExit(f"{' '.join(arguments)}: {document['error']}")
    return document


def compare(title: str, plan: dict[str, Any], took: dict[str, float], peaks: dict[str, float]) -> bool:
    """Print the stages of a run beside what was predicted; whether every bar is met."""
    hours = {row["stage"]: row["wall_hours"] * 3600 for row in plan["time"]["stages"]}
    memory = {row["stage"]: row["host_gib"] for row in plan["memory"]["stages"]}
    total, good = sum(took.values()), True
    print(f"\n{title}\n{'stage':<16}{'predicted':>10}{'took':>9}{'ratio':>7}{'predicted':>12}{'peak':>7}  GiB")
    for stage, seconds in took.items():
        ratio = hours.get(stage, 0.0) / seconds if seconds else 1.0
        judged = seconds >= SHORT or seconds > 0.02 * total
        time_bad = judged and not 1 / FACTOR <= ratio <= FACTOR
        foretold, peak = memory.get(stage, 0.0), peaks.get(stage, 0.0)
        memory_bad = bool(peak) and abs(foretold / peak - 1) > SHARE
        good &= not time_bad and not memory_bad
        marks = " time" * time_bad + " memory" * memory_bad
        print(
            f"{stage:<16}{hours.get(stage, 0):>10.1f}{seconds:>9.1f}{ratio:>7.2f}{foretold:>12.2f}{peak:>7.2f} {marks}"
        )
    whole = sum(hours.get(stage, 0.0) for stage in took)
    print(f"{'all':<16}{whole:>10.1f}{total:>9.1f}{whole / total:>7.2f}")
    return good


def main(recipe: str = "tiny-flux", form: str = "nvfp4", place: str | None = None) -> None:
    folder = Path(place or tempfile.mkdtemp())
    what = [recipe, "--quantize", form]
    first = command(folder, "rehearse", *what, "--run-dir", "first")
    measured = ["--disk", "2000", "--measured", first["file"]]
    second = command(folder, "rehearse", *what, "--run-dir", "second", "--pictures", "40", "--steps", "6")
    (folder / "second.yaml").write_text(yaml.safe_dump(second["recipe"]))
    rows = {row["stage"]: row for row in second["stages"]}
    good = compare(
        "second rehearsal: 40 pictures, 6 steps",
        command(folder, "plan", "second.yaml", *measured),
        {stage: row["seconds"] for stage, row in rows.items()},
        {stage: row["peak"]["host"] / GIB for stage, row in rows.items() if row["peak"]},
    )
    plan = command(folder, "plan", *what, *measured)
    done = command(folder, *what, "-o", "bundle", "--run-dir", "run", "-y")
    good &= compare(
        "the whole conversion",
        plan,
        {row["name"]: row["seconds"] for row in done["stages"]},
        {row["name"]: row["peak"]["host"] / GIB for row in done["stages"]},
    )
    print("\nall bars are met" if good else "\na bar is missed")


if __name__ == "__main__":
    main(*sys.argv[1:])
