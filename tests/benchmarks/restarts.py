"""`--restarts 3`: whole tiny conversions on two ranks, with one `kill -9` of a random rank at a random moment in each.

    python tests/benchmarks/restarts.py [runs, 20] [seed, 0]

First one run that nobody disturbs, then the others. Each must end by itself with exit code 0. All files of its bundle
and its run folder must be those of the undisturbed run, but for times, hardware and logs. Prints for every run which
rank was killed, when and in which stage, how long the run took, and what differs.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import start_cli

from dcgen_convert.bundle.manifest import split_timing
from dcgen_convert.core.journal import MARKER

SOURCE = ["tiny-flux", "--ae", "tiny-dc-ae-f32", "--quantize", "nvfp4", "-y", "-o", "bundle", "--run-dir", "run"]
SETTINGS = {
    "data.count": 48,
    "data.steps": 2,
    "data.batch": 8,
    "align_head.draws": 1,
    "align_head.steps": 4,
    "adapt.phases.0.steps": 24,
    "adapt.phases.0.batch": 8,
    "evaluate.prompts": 2,
    "quantize.calibration.prompts": 4,
    "quantize.calibration.steps": 1,
    "quantize.calibration.batch": 1,
    "latents.scale_tolerance": 0.9,
}
LONGEST = 900.0  # seconds after which a run counts as one that does not end
STATE = ("log", "lock", "recipe.json", "asked.json")  # of the run folder: about this very run
UNEQUAL = ("times", "hardware")  # keys of the manifest
CURVE = ("step", "loss", "grad_norm", "lr", "evaluation")  # of a line of metrics: the rest are rates and memory


def start(folder: Path) -> subprocess.Popen:
    folder.mkdir()
    sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    return start_cli(*SOURCE, *sets, "--gpus", "2", "--restarts", "3", cwd=folder)


def ranks(folder: Path) -> dict[int, psutil.Process]:
    found = {}
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and "RANK" in process.environ() and process.ppid() > 1:
                found[int(process.environ()["RANK"])] = process
        except psutil.Error:
            continue
    return found


def kill_one(process: subprocess.Popen, folder: Path, moment: float, chance: random.Random) -> str | None:
    """Kill a rank ``moment`` seconds after the start, or as soon as there are two.

    Returns what was done, in words; None if the run ended before.
    """
    begun = time.monotonic()
    while process.poll() is None:
        alive = ranks(folder)
        if time.monotonic() - begun >= moment and len(alive) == 2:
            victim = chance.choice(sorted(alive))
            stage = max((folder / "run").glob("*/started.json"), default=None, key=lambda path: path.stat().st_mtime)
            alive[victim].kill()
            at = stage.parent.name if stage else "no stage"
            return f"rank {victim} killed after {time.monotonic() - begun:.1f} s in {at}"
        time.sleep(0.05)
    return None


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that must be equal, without what may differ in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith(tuple(f"run/{part}" for part in STATE)):
            found[name] = equal_part(path).replace(str(folder).encode(), b"")
    return found


def equal_part(path: Path) -> bytes:
    """What must be equal of a file."""
    if "checkpoints" in path.parts:
        return b""  # of moments that depend on the clock
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return json.dumps([{key: line[key] for key in CURVE if key in line} for line in lines]).encode()
    if path.name == MARKER:  # its inputs and fingerprint hold the place of the run
        return json.dumps(split_timing(json.loads(path.read_bytes())["metrics"])[0]).encode()
    if path.suffix == ".json":
        document = json.loads(path.read_bytes())
        if isinstance(document, dict):
            return json.dumps({key: value for key, value in document.items() if key not in UNEQUAL}).encode()
    return path.read_bytes()


def finish(process: subprocess.Popen) -> tuple[int | None, str]:
    try:
        _, said = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        return None, "it does not end"
    return process.returncode, said


def main(runs: int, seed: int) -> int:
    root, chance, failed = Path(tempfile.mkdtemp()), random.Random(seed), 0
    begun = time.monotonic()
    code, said = finish(start(root / "whole"))
    whole, seconds = contents(root / "whole"), time.monotonic() - begun
    print(f"undisturbed: exit code {code}, {seconds:.0f} s, {len(whole)} files, in {root}", flush=True)
    if code:
        print(said)
        return 1
    number = 0
    while number < runs:
        folder, begun = root / f"run-{number}", time.monotonic()
        process = start(folder)
        what = kill_one(process, folder, chance.uniform(0.0, seconds), chance)
        code, said = finish(process)
        if what is None and code == 0:  # faster than the undisturbed run: it proves nothing
            shutil.rmtree(folder)
            continue
        found = contents(folder)
        names = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
        left = ranks(folder)
        good = code == 0 and not names and not left
        failed += not good
        number += 1
        print(
            f"{number}: {what}; exit code {code} after {time.monotonic() - begun:.0f} s; {len(names)} files differ",
            flush=True,
        )
        if not good:
            print("   ", *names[:8], *(["still there:", left] if left else []))
            print("   ", *said.splitlines()[-6:] if code else "", sep="\n    ")
    print(f"{runs - failed} of {runs} runs ended by themselves with the files of the undisturbed run")
    return 1 if failed else 0


if __name__ == "__main__":
    given = [int(value) for value in sys.argv[1:]]
    raise SystemExit(main(*given, *(20, 0)[len(given) :]))
