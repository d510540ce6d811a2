"""Kill -9 storm: kills at random moments, every second one inside a save; the run must come out as if undisturbed.

    python tests/benchmarks/train_kill_storm.py [kills, 60] [world, 1] [zero, 2]

With several ranks every other pair of kills takes one rank only: the others must end by themselves, with exit code 4.
Prints the number of kills, of unfinished saves they left, of failed resumes, of hangs (a rank alive 30 s after another
one died), the longest time that ranks outlived a dead one, and whether losses and export are bitwise those of the
undisturbed run.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from train_worker import losses, run_ranks, start_ranks

from dcgen_convert.core.files import TEMPORARY

STEPS = 40
HANG = 30.0  # seconds


def exported(folder: Path) -> dict[str, torch.Tensor]:
    files = [load_file(path) for path in (folder / "export").glob("*.safetensors")]
    return {name: value for tensors in files for name, value in tensors.items()}


def await_moment(ranks: list[subprocess.Popen], folder: Path, inside_a_save: bool, chance: random.Random) -> None:
    """Until this start trains, and then until a save begins, or for up to half a second."""
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_ino if metrics.exists() else None
    while ranks[0].poll() is None and not (metrics.exists() and metrics.stat().st_ino != before):
        time.sleep(0.001)
    if not inside_a_save:
        time.sleep(chance.uniform(0, 0.5))
        return
    while ranks[0].poll() is None and not any((folder / "checkpoints").glob(f"{TEMPORARY}*")):
        time.sleep(0.0002)


def outlived(ranks: list[subprocess.Popen], victim: int) -> tuple[float, bool]:
    """Kill one rank; (seconds until the last of the others has ended, whether all of them said 4)."""
    ranks[victim].kill()
    start = time.monotonic()
    while any(process.poll() is None for process in ranks) and time.monotonic() - start < HANG:
        time.sleep(0.02)
    others = [process.poll() for number, process in enumerate(ranks) if number != victim]
    return time.monotonic() - start, all(code == 4 for code in others)


def undisturbed(folder: Path, whole: Path) -> bool:
    """Whether losses and export are bitwise those of the run that nobody disturbed."""
    ours, theirs = exported(folder), exported(whole)
    weights = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return weights and losses(folder) == losses(whole)


def main(kills: int, world: int, zero: int) -> int:
    root, chance = Path(tempfile.mkdtemp()), random.Random(0)
    log, folders = root / "run.log", [root / "run-0"]
    options = {"phase": {"steps": STEPS}, "adapt": {"zero": zero}, "saving": [1, 0.0]}
    run_ranks(world, [{"folder": str(root / "whole"), **options}], log)
    done = halves = failed = hangs = wrong = 0
    longest = 0.0
    while done < kills:
        ranks = start_ranks(world, [{"folder": str(folders[-1]), **options}], log)
        await_moment(ranks, folders[-1], done % 2 == 1, chance)
        codes = [process.poll() for process in ranks]
        if all(code == 0 for code in codes):  # it came to its end between two kills: the next one begins
            folders.append(root / f"run-{len(folders)}")
            continue
        failed += any(code not in (None, 0) for code in codes)
        if world > 1 and done % 4 < 2:
            seconds, right = outlived(ranks, chance.randrange(world))
            longest, hangs, wrong = max(longest, seconds), hangs + (seconds >= HANG), wrong + (not right)
        for process in ranks:
            process.kill()
            process.communicate()
        done += 1
        halves += any((folders[-1] / "checkpoints").glob(f"{TEMPORARY}*"))
        print(
            f"{done} of {kills} kills: {failed} failed resumes, {hangs} hangs, {wrong} wrong codes",
            file=sys.stderr,
            flush=True,
        )
    run_ranks(world, [{"folder": str(folders[-1]), **options}], log)
    same = sum(undisturbed(folder, root / "whole") for folder in folders)
    print(f"world {world} ZeRO {zero}: {done} kills, {halves} unfinished saves, {failed} failed resumes")
    print(f"{hangs} hangs, {wrong} wrong exit codes, ranks outlived a dead one by {longest:.1f} s at most")
    print(f"losses and export bitwise those of the undisturbed run: {same} of {len(folders)} runs; log: {log}")
    return 0 if same == len(folders) and not failed + hangs + wrong else 1


if __name__ == "__main__":
    given = sys.argv[1:]
    kills, world, zero = (int(value) for value in (*given, *("60", "1", "2")[len(given) :]))
    raise SystemExit(main(kills, world, zero))
