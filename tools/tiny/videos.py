"""Draw the tiny world in motion into a file, for tests and for training miniatures.

python -m tools.tiny.videos FILE.safetensors [--count 64] [--frames 16] [--side 128] [--seed 0]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from dcgen_convert.core.files import atomic_save
from dcgen_convert.tiny import world
from dcgen_convert.tiny.videos import FRAMES, draw, sample_labels


def main(arguments: Sequence[str] | None = None) -> None:
    """Write `videos` (N, 3, frames, side, side) uint8 and `labels` (N, 7)."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny.videos")
    parser.add_argument("file", type=Path)
    for name, default in (("count", 64), ("frames", FRAMES), ("side", world.SIDE), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(arguments)
    labels = sample_labels(given.count, given.seed)
    parts = [draw(rows, given.seed + i, given.frames, given.side) for i, rows in enumerate(labels.split(16))]
    pixels = ((torch.cat(parts) + 1) * 127.5).round().to(torch.uint8)
    atomic_save({"videos": pixels, "labels": labels}, given.file)


if __name__ == "__main__":
    main()
