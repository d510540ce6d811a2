"""Which early verdicts three trainings of tiny-flux hear, and when.

    PYTHONPATH=. python tests/benchmarks/early_verdicts.py FOLDER [steps, the recipe's]

healthy:   the quick recipe.
unaligned: `ablations/no-alignment`.
shuffled:  the quick recipe, but in training each picture has the caption of another one; held-out pictures keep theirs.

Each is looked at every 20 steps, with 16 pictures. FOLDER keeps the runs: the same command continues after a kill.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dcgen_convert.conversion import convert
from dcgen_convert.core.console import Console
from dcgen_convert.core.files import read_json
from dcgen_convert.data import cache
from dcgen_convert.recipe.loading import load

EVERY, PICTURES = 20, 16
TRAININGS = {"healthy": "tiny-flux", "unaligned": "ablations/no-alignment", "shuffled": "tiny-flux"}
WATCH = [
    f"watch.grid_every={EVERY}",
    f"watch.evaluate_every={EVERY}",
    f"watch.pictures={PICTURES}",
    "watch.metrics=[accuracy, frechet, tiny-cmmd]",
]


def shuffle() -> None:
    """From now on the rows of a training get the text of other rows."""
    own = cache.LatentCache.condition

    def condition(self, indices):
        if isinstance(self.rows, cache._Others):  # all but the held-out rows
            indices = [(389 * int(i) + 101) % len(self.rows) for i in indices]
        return own(self, indices)

    cache.LatentCache.condition = condition


def main() -> None:
    folder, steps = Path(sys.argv[1]).absolute(), [f"adapt.phases.0.steps={n}" for n in sys.argv[2:3]]
    for name, recipe in TRAININGS.items():
        if name == "shuffled":  # the last
            shuffle()
        run = folder / name
        console = Console("quiet", log_file=folder / f"{name}.txt")
        convert(load(recipe, sets=[*WATCH, *steps]), run, folder / f"{name}-bundle", console, until="adapt-1")
        log = (folder / f"{name}.txt").read_text().splitlines()
        metrics = read_json(run / "adapt-1" / "stage.json")["metrics"]
        print(f"{name}: held-out loss {metrics['evaluation']['before']['mean']:.3f} -> "
              f"{metrics['evaluation']['after']['mean']:.3f}")  # fmt: skip
        for line in log:
            if " warning " in line or "hardly improves" in line:
                print(f"    {line}")
        if "verdicts" not in metrics:
            print("    no verdict at the end")


if __name__ == "__main__":
    main()
