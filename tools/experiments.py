"""The experiments behind docs/evidence.md. A file in recipes/experiments is a claim, and the conversions that test it.

    python tools/experiments.py                       # the claims, and the number of conversions of each
    python tools/experiments.py NAME WORK [--seeds N] [--set KEY=VALUE ...]

Every row of an experiment is converted by the real command, once per seed, and judged on 256 prompts. WORK keeps runs
and bundles, so the script goes on where it stopped. A conversion that two experiments have in common is made once, and
pictures and latents come from the row that has the same recipe and nothing else, where they are the same there.
A table goes to stdout and to WORK/NAME.md, the curves of the held-out loss to WORK/NAME.svg.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dcgen_convert.core import yaml_text
from dcgen_convert.data import prompts
from dcgen_convert.data.drawn import CAPTIONS_SEED, WORD
from dcgen_convert.evaluation import charts
from dcgen_convert.recipe import shelf

FOLDER = shelf.root() / shelf.EXPERIMENTS
PROMPTS, CAPTIONS, EVERY = 256, 1024, 50  # judged on; captions for rows that name them; steps between two losses
KEPT = ("sources", "data", "latents")  # stages of another row that may be the same; the journal decides
HEAD = (
    "| | loss: heads' closed form / end | accuracy: base / converted | Frechet (of edits preservation): base / "
    "converted | gap of the last block | seconds |\n|---|---|---|---|---|---|"
)
FIGURES = (("accuracy", ".1%"), ("frechet", ".0f"))
OF_EDITS = (("edit_accuracy", ".1%"), ("preservation", ".1%"))


@dataclass(frozen=True)
class Experiment:
    """A claim, where it comes from, and name -> options of the command ``convert`` for each row."""

    claim: str
    source: str
    rows: Mapping[str, Sequence[str]]


def experiments() -> dict[str, Experiment]:
    """Every shipped experiment by its name."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {path.stem: Experiment(**yaml_text.parse(path.read_text(), str(path))) for path in files}


def run(name: str, work: Path, seeds: int, settings: Sequence[str]) -> None:
    experiment = experiments()[name]
    work.mkdir(parents=True, exist_ok=True)
    (work / "captions.txt").write_text(
        "".join(f"{line}\n" for line in prompts.generated(WORD, CAPTIONS, CAPTIONS_SEED))
    )
    lines, curves = [HEAD], {}
    for label, options in experiment.rows.items():
        made = [converted(work, options, seed, settings) for seed in range(seeds)]
        lines.append(row(label, [document for document, _ in made]))
        curves[label] = mean_curve([curve for _, curve in made])
        print("\n".join(lines if len(lines) == 2 else lines[-1:]), flush=True)
    text = f"{experiment.claim} ({experiment.source})\n\n" + "\n".join(lines) + "\n"
    (work / f"{name}.md").write_text(text)
    (work / f"{name}.svg").write_text(charts.line_file(curves, x_label="step", y_label="held-out loss"))


def converted(
    work: Path, options: Sequence[str], seed: int, settings: Sequence[str]
) -> tuple[dict[str, Any], charts.Points]:
    """The result document of one conversion, and its curve of (step, held-out loss)."""
    every = (
        f"--set=seed={seed}",
        f"--set=watch.evaluate_every={EVERY}",
        "--set=watch.grid_every=0",
        f"--set=evaluate.prompts={PROMPTS}",
        *(f"--set={setting}" for setting in settings),
    )
    folder = folder_of(work, [*options, *settings], seed)
    folder.mkdir(exist_ok=True)
    document = folder / "result.json"
    if not document.exists():
        origin = folder_of(work, [*options[:1], *settings], seed) / "run"
        for stage in KEPT if origin.exists() and not (folder / "run").exists() else ():
            if (origin / stage).exists():
                shutil.copytree(origin / stage, folder / "run" / stage)
        command = [sys.executable, "-m", "dcgen_convert.cli", "convert", *(text.format(work=work) for text in options)]
        command += [*every, "-o", str(folder / "bundle"), "--run-dir", str(folder / "run"), "-y", "--json"]
        with open(folder / "log.txt", "a") as log:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=True)
        document.write_text(done.stdout)
    lines = (folder / "run" / "adapt-1" / "evaluations.jsonl").read_text().splitlines()
    found = json.loads(document.read_text())
    curve = [(line["step"], line["mean"]) for line in map(json.loads, lines)]
    return found, [(0, losses(found)["before"]["mean"]), *curve]


def losses(document: dict[str, Any]) -> dict[str, Any]:
    """The held-out losses "before" and "after" the training."""
    (stage,) = (stage for stage in document["stages"] if stage["name"] == "adapt-1")
    found: dict[str, Any] = stage["metrics"]["evaluation"]
    return found


def folder_of(work: Path, options: Sequence[str], seed: int) -> Path:
    return work / re.sub(r"[^\w.=-]+", "-", "_".join([*options, str(seed)]))


def mean_curve(curves: Sequence[charts.Points]) -> charts.Points:
    """The mean of curves that have the same steps."""
    return [(points[0][0], fmean(value for _, value in points)) for points in zip(*curves, strict=True)]


def row(label: str, documents: Sequence[dict[str, Any]]) -> str:
    """One row of the table: means of the seeds, and what each seed gave behind them."""
    stages = [{stage["name"]: stage for stage in document["stages"]} for document in documents]
    both = [[losses(document)[when]["mean"] for document in documents] for when in ("before", "after")]
    metrics = [document["metrics"] for document in documents]
    pairs = [
        " / ".join(shown([one[f"{kind}_{whose}"] for one in metrics], form) for whose in ("source", "converted"))
        for kind, form in (FIGURES if "accuracy_source" in metrics[0] else OF_EDITS)
    ]
    gaps = shown([one["merge-1"]["metrics"]["gap"][-1] for one in stages], ".3f")
    seconds = fmean(sum(stage["seconds"] for stage in one.values()) for one in stages)
    loss = " / ".join(shown(one, ".3f") for one in both)
    return f"| {label} | {loss} | {' | '.join(pairs)} | {gaps} | {seconds:.0f} |"


def shown(values: Sequence[float], form: str) -> str:
    each = ", ".join(format(value, form) for value in values)
    return f"{fmean(values):{form}}" + (f" ({each})" if len(set(each.split(", "))) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=[*experiments()])
    parser.add_argument("work", nargs="?", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    if given.name and not given.work:
        parser.error("WORK is missing: the folder that keeps runs and bundles")
    if given.name:
        run(given.name, given.work.resolve(), given.seeds, given.set)
    else:
        for name, experiment in experiments().items():
            print(f"{name}: {experiment.claim} {len(experiment.rows)} conversions per seed")
