"""Home against pooled: what the alignment's target does at equal pictures and steps, in one table.

    PYTHONPATH=. python tests/benchmarks/home_grid.py WORK [GEOMETRY ...] [--steps N] [--seeds N]

By the real command. The geometries are those of GEOMETRIES; without one all of them are measured, smallest first. The
tiny world draws all pictures, and no step has frozen blocks. WORK keeps runs and bundles, so the script goes on where
it stopped, and the pictures of a geometry are drawn once. CPU seconds are those of the training processes: the machine
may do other work beside. Compare rows of one geometry only.

* 256: tiny-flux (128 px) to f32 at 256 px. Home is 128 px, the size that the base was trained on. In miniature FLUX to
  f64 at 4096 px.
* 512: the same to f64 at 512 px.
* 128: tiny-flux to f32 at 128 px. Home is 64 px, half of what the base was trained on. In miniature FLUX to f32 at
  1024 px; but FLUX was trained on 512 px, and tiny-flux never saw 64 px.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

from conversion import convert

PROMPTS = 128
OWN = ["--data", "tiny-world:128", "--set", "align_head.steps=0", "--set", "adapt.phases.0.batch=32"]
GEOMETRIES = {"256": ["tiny-flux-256"], "512": ["tiny-flux-512"], "128": ["tiny-flux", *OWN]}
TARGETS = ("pooled", "home")
EARLY = 100  # step whose loss is told
HEAD = (
    f"| px, target, seed | embedder MSE | loss: heads' closed form / after {EARLY} steps / end | accuracy | Frechet: "
    "whole, parts of 128 px | gap of the last block | CPU s |\n|---|---|---|---|---|---|---|"
)


def main(work: Path, geometries: list[str], steps: int, seeds: int) -> None:
    print(HEAD, flush=True)
    for name in geometries or sorted(GEOMETRIES, key=int):
        for seed in range(seeds):
            for target in TARGETS:
                folder = work / f"{name}-{steps}-{target}-{seed}"
                settings = {
                    "align_embedder.target": target,
                    "seed": seed,
                    "adapt.phases.0.steps": steps,
                    "watch.evaluate_every": EARLY,
                    "watch.grid_every": 0,
                    "evaluate.prompts": PROMPTS,
                }
                options = [*GEOMETRIES[name], *(f"--set={key}={value}" for key, value in settings.items())]
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                found = convert(folder, options, work / f"{name}-{steps}-{TARGETS[0]}-0")
                used = resource.getrusage(resource.RUSAGE_CHILDREN)
                seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
                print(row(f"{name}, {target}, {seed}", folder / "run", found, seconds), flush=True)


def row(name: str, run: Path, document: dict, seconds: float) -> str:
    metrics = {stage["name"]: stage["metrics"] for stage in document["stages"]}
    lines = (run / "adapt-1" / "evaluations.jsonl").read_text().splitlines()
    early = next((line["mean"] for line in map(json.loads, lines) if line["step"] == EARLY), float("nan"))
    losses = [metrics["adapt-1"]["evaluation"][when]["mean"] for when in ("before", "after")]
    verified = metrics["verify"]
    parts = verified.get("crops_frechet_converted")
    frechet = f"{verified['frechet_converted']:.0f}" + (f", {parts:.0f}" if parts else "")
    return (
        f"| {name} | {metrics['align-embedder']['mse_after']:.3f} | {losses[0]:.3f} / {early:.3f} / {losses[1]:.3f} "
        f"| {verified['accuracy_converted']:.1%} of {verified['accuracy_source']:.1%} | {frechet} "
        f"| {metrics['merge-1']['gap'][-1]:.3f} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("geometries", nargs="*", choices=[*GEOMETRIES, []])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    main(given.work, given.geometries, given.steps, given.seeds)
