"""The whole method for a U-Net.

A miniature of Stable Diffusion 1.5 is trained on the tiny world. It is converted to `tiny-dc-ae-f32` with and without
alignment; the script prints a row of a table for each.

    PYTHONPATH=. python tests/benchmarks/unet.py WORK [--steps N] [--pictures N] [OPTION ...]

Run it in the repository's root folder: it needs tools/tiny. WORK keeps what was made, so that the script goes on where
it stopped. --steps and --pictures shorten the base model's training; every OPTION is one of `dcgen-convert convert`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conversion import HEAD, PROMPTS, convert, folder_of, row

from tools.tiny import assemble, parts

RECIPE = Path(__file__).with_suffix(".yaml")
NONE = ["align_embedder.method=none", "align_head.method=xavier", "align_head.steps=0"]
ROWS = {"aligned": [], "no alignment": [part for setting in NONE for part in ("--set", setting)]}


def base(work: Path, steps: int | None, pictures: int | None) -> Path:
    """The base model's pipeline folder, trained where it is not there yet."""
    if not (work / "unet").exists():
        if steps:
            parts.PHASES["unet"] = [(steps, parts.PHASES["unet"][0][1])]
        parts.PICTURES["unet"] = pictures or parts.PICTURES["unet"]
        parts.make(work, "unet", print)
    folder = work / "weights" / "tiny-unet"
    if not folder.exists():
        assemble.write(work, work / "weights")
    return folder


def main(work: Path, steps: int | None, pictures: int | None, options: list[str]) -> None:
    source = str(base(work, steps, pictures))
    print(HEAD)
    for name, settings in ROWS.items():
        call = [source, "--recipe", str(RECIPE), *settings, "--set", f"evaluate.prompts={PROMPTS}", *options]
        print(row(name, convert(folder_of(work, name), call, work / next(iter(ROWS)))), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--pictures", type=int)
    known, rest = parser.parse_known_args()
    main(known.work, known.steps, known.pictures, rest)
