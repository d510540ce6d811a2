"""Kill -9 storm: kills at random moments, every second one inside a save; the run must come out as if undisturbed.

    python tests/benchmarks/train_kill_storm.py [kills] [world] [zero]

Every kill takes all ranks at once. Prints the number of kills, of unfinished saves they left, of failed resumes, and
whether losses and export are bitwise those of the undisturbed run.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from train_worker import losses, run_ranks, start_ranks  # noqa: E402

from dcgen_convert.files import TEMPORARY  # noqa: E402

STEPS = 40


def exported(folder: Path) -> dict[str, torch.Tensor]:
    files = [load_file(path) for path in (folder / "export").glob("*.safetensors")]
    return {name: value for tensors in files for name, value in tensors.items()}


def main(kills: int, world: int, zero: int) -> int:
    root = Path(tempfile.mkdtemp())
    folder, log, chance = root / "run", root / "run.log", random.Random(0)
    options = {"phase": {"steps": STEPS}, "adapt": {"zero": zero}, "saving": [1, 0.0]}
    run_ranks(world, [{"folder": str(root / "whole"), **options}], log)
    done = halves = failed = 0
    while done < kills:
        ranks = start_ranks(world, [{"folder": str(folder), **options}], log)
        metrics = folder / "metrics.jsonl"
        before = metrics.stat().st_ino if metrics.exists() else None
        while ranks[0].poll() is None and not (metrics.exists() and metrics.stat().st_ino != before):
            time.sleep(0.001)
        if done % 2:
            while ranks[0].poll() is None and not any((folder / "checkpoints").glob(f"{TEMPORARY}*")):
                time.sleep(0.0002)
        else:
            time.sleep(chance.uniform(0, 0.5))
        failed += sum(process.poll() not in (None, 0) for process in ranks)
        for process in ranks:
            process.kill()
            process.communicate()
        done += 1
        halves += any((folder / "checkpoints").glob(f"{TEMPORARY}*"))
    run_ranks(world, [{"folder": str(folder), **options}], log)
    curve = losses(folder) == losses(root / "whole")
    ours, theirs = exported(folder), exported(root / "whole")
    weights = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    print(f"world {world} ZeRO {zero}: {done} kills, {halves} unfinished saves, {failed} failed resumes")
    print(f"losses bitwise: {curve}; export bitwise: {weights}; log: {log}")
    return 0 if curve and weights and not failed else 1


if __name__ == "__main__":
    kills, world, zero = (int(value) for value in [*sys.argv[1:], "20", "1", "2"][:3])
    raise SystemExit(main(kills, world, zero))
