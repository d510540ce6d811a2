"""How a phase trains: the published procedure, ours, and each difference, at equal steps, in one table.

    PYTHONPATH=. python tests/benchmarks/defaults.py WORK [ROW ...] [--steps N] [--batch N] [--seeds N] [--ae AE]

By the real command. N steps in all: where embedder and head train with frozen blocks, that takes a fifth of them. WORK
keeps runs and bundles, so the script goes on where it stopped, and pictures and alignments are shared by the rows that
have them in common. CPU seconds are those of all processes from the alignment on: the machine may do other work beside.
Compare rows of one seed and one number of steps only.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

from conversion import convert

HEAD = (
    "| row, seed | loss: before LoRA / after {early} steps of LoRA / end | accuracy | Frechet | CPU s |\n"
    "|---|---|---|---|---|"
)
EARLY = 100
PROMPTS = 128
ADAMW = {"adapt.optimizer": "adamw"}
GRADIENT = {"adapt.lora_start": "gradient"}
PUBLISHED = {"align_embedder.method": "adamw", "align_head.method": "xavier", **ADAMW}
FIFTH = {"head": True}
ROWS: dict[str, dict[str, object]] = {
    "published": {**PUBLISHED, **FIFTH},
    "adamw, head steps": {**ADAMW, **FIFTH},
    "adamw": ADAMW,
    "adamw, gradient start": {**ADAMW, **GRADIENT},
    "adamw, rate x 2": {**ADAMW, "adapt.phases.0.lr": 6e-3},
    "muon": {},
    "muon, gradient start": GRADIENT,
    "muon, rate x 2": {"adapt.phases.0.lr": 6e-3},
    "muon, rate / 2": {"adapt.phases.0.lr": 1.5e-3},
    "muon, rank 32": {"adapt.phases.0.rank": 32},
    "muon, every weight": {"adapt.phases.0.mode": "full", "adapt.phases.0.lr": 2e-3},
}


def main(work: Path, names: list[str], steps: int, batch: int, seeds: int, ae: str) -> None:
    print(HEAD.format(early=EARLY), flush=True)
    for seed in range(seeds):
        common = work / f"common-{seed}"
        base = {"seed": seed, "evaluate.prompts": PROMPTS, "watch.evaluate_every": EARLY, "watch.grid_every": 0}
        if not (common / "run" / "align-head" / "stage.json").exists():
            convert(common, [*options(base | {"align_head.steps": 0}, ae), "--until", "align-head"], common)
        for name in names or ROWS:
            folder = work / f"{name.replace(' ', '-').replace('/', 'by')}-{steps}-{batch}-{seed}"
            before = used()
            found = convert(folder, options(base | settings(ROWS[name], steps, batch), ae), common)
            print(row(f"{name}, {seed}", folder / "run", found, used() - before), flush=True)


def settings(chosen: dict[str, object], steps: int, batch: int) -> dict[str, object]:
    """The settings of a row with ``steps`` in all."""
    rest = {key: value for key, value in chosen.items() if key != "head"}
    head = steps // 5 if chosen.get("head") else 0
    more = {"align_head.steps": head, "align_head.batch": batch, "adapt.phases.0.batch": batch}
    return {**more, "adapt.phases.0.steps": steps - head, **rest}


def options(values: dict[str, object], ae: str) -> list[str]:
    return ["tiny-flux", "--ae", ae, *(f"--set={key}={value}" for key, value in values.items())]


def used() -> float:
    """CPU seconds of all processes that have ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def row(name: str, run: Path, document: dict, seconds: float) -> str:
    metrics = {stage["name"]: stage["metrics"] for stage in document["stages"]}
    watched = run / "adapt-1" / "evaluations.jsonl"  # absent where fewer steps are done
    lines = watched.read_text().splitlines() if watched.exists() else []
    early = next((line["mean"] for line in map(json.loads, lines) if line["step"] == EARLY), float("nan"))
    before, after = (metrics["adapt-1"]["evaluation"][when]["mean"] for when in ("before", "after"))
    verified = metrics["verify"]
    return (
        f"| {name} | {before:.3f} / {early:.3f} / {after:.3f} "
        f"| {verified['accuracy_converted']:.1%} of {verified['accuracy_source']:.1%} "
        f"| {verified['frechet_converted']:.0f} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ae", default="tiny-dc-ae-f32")
    given = parser.parse_args()
    main(given.work, given.rows, given.steps, given.batch, given.seeds, given.ae)
