"""Loss curves of every layout against one process with ZeRO 2: the same global batch, 100 steps of a tiny FLUX.

    python tests/benchmarks/train_layouts.py [steps]

Prints the largest loss difference of 1, 2 and 3 ranks with ZeRO 1, 2 and 3, in fp32 (bar 1e-6) and bf16 (bar 1e-2),
then of runs that were stopped half-way and went on with another number of ranks and another stage (bar 1e-6).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from train_worker import losses, run_ranks

from dcgen_convert.train.checkpoints import INDEX, whole

BARS = {"fp32": 1e-6, "bf16": 1e-2}
RESUMES = (((2, 3), (1, 2)), ((1, 2), (2, 3)), ((3, 1), (2, 2)), ((2, 2), (3, 3)), ((3, 3), (1, 1)))


def job(folder: Path, zero: int, dtype: str, steps: int) -> dict:
    return {
        "folder": str(folder),
        "adapt": {"zero": zero},
        "dtype": dtype,
        "phase": {"steps": steps},
        "saving": [steps // 2, 0.0],
    }


def difference(folder: Path, reference: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses(folder), reference, strict=True))


def half_way(origin: Path, folder: Path) -> None:
    """A run as it was when only the checkpoint in the middle had been written."""
    shutil.copytree(origin / "checkpoints", folder / "checkpoints")
    shutil.copy(origin / "metrics.jsonl", folder)
    (whole(folder / "checkpoints")[-1] / INDEX).unlink()


def main(steps: int) -> int:
    root, failed = Path(tempfile.mkdtemp()), 0

    def place(world: int, zero: int, dtype: str) -> Path:
        return root / f"{dtype}-{world}-{zero}"

    layouts = {world: [(zero, dtype) for dtype in BARS for zero in (1, 2, 3)] for world in (1, 2, 3)}
    for world, rows in layouts.items():
        run_ranks(world, [job(place(world, *row), *row, steps) for row in rows], root / "log", timeout=3600)
    for world, rows in layouts.items():
        for zero, dtype in rows:
            found = difference(place(world, zero, dtype), losses(place(1, 2, dtype)))
            failed += found > BARS[dtype]
            print(f"{dtype} world {world} ZeRO {zero}: {found:.2g}")
    jobs = {world: [] for world in (1, 2, 3)}
    for (world, zero), (other, stage) in RESUMES:
        folder = root / f"resumed-{world}-{zero}-{other}-{stage}"
        half_way(place(world, zero, "fp32"), folder)
        jobs[other].append(job(folder, stage, "fp32", steps))
    for world, rows in jobs.items():
        run_ranks(world, rows, root / "log", timeout=3600)
    for (world, zero), (other, stage) in RESUMES:
        found = difference(root / f"resumed-{world}-{zero}-{other}-{stage}", losses(place(1, 2, "fp32")))
        failed += found > BARS["fp32"]
        print(f"fp32 stopped at world {world} ZeRO {zero}, resumed at world {other} ZeRO {stage}: {found:.2g}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
