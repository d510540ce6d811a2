"""`python -m tests.fuzz`: 5,000 mutations and more, over all kinds of input. Exit 1 when one is not answered well."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from . import harness
from .targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--each", type=int, default=230, help="mutations of each kind of input (default: 230)")
    parser.add_argument("--seed", type=int, default=1000, help="number of the first one (default: 1000)")
    parser.add_argument("--only", help="one kind of input, by its name")
    options = parser.parse_args()
    chosen = [target for target in TARGETS if options.only in (None, target.name)]
    faults: list[str] = []
    for target in chosen:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = harness.run(target, options.each, options.seed, Path(folder))
        print(
            f"{target.name}: {options.each} mutations, {len(found)} faults, {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        print("".join(f"  {fault}\n" for fault in found), end="", flush=True)
        faults += found
    print(f"{len(chosen) * options.each} mutations, {len(faults)} faults, {harness.largest() / 1e9:.1f} GB at most")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
