"""A few-step model through the whole method: distils the shipped tiny-sana to a miniature of SANA-Sprint, converts it to
`tiny-dc-ae-f64`, and prints one table row with the last phase as consistency distillation and one with the plain flow loss.

    python tests/benchmarks/few_steps.py WORK [OPTION ...]

WORK keeps what was made, so that the script goes on where it stopped. Every OPTION is one of `dcgen-convert convert`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from conversion import HEAD, PROMPTS, convert, row

from dcgen_convert.tiny.training import __main__ as training
from dcgen_convert.tiny.training import assemble

RECIPE = Path(__file__).with_suffix(".yaml")
ROWS = {"consistency": [], "flow": ["--set", "adapt.phases.1.consistency=0"]}
PART = "sana-sprint"


def main(work: Path, options: list[str]) -> None:
    if not (work / PART).exists():
        training.main([str(work), PART])
        assemble.write(work, work / "weights")
    source = str(work / "weights" / f"tiny-{PART}")
    print(HEAD)
    for name, settings in ROWS.items():
        call = [source, "--recipe", str(RECIPE), "--set", f"evaluate.prompts={PROMPTS}", *settings, *options]
        print(row(name, convert(work / name, call, work / next(iter(ROWS)))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
