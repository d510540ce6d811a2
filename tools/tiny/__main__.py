"""The commands that made the shipped checkpoints of the tiny world. Run them in the repository's root folder.

    python -m tools.tiny WORK evaluator | motion
    python -m tools.tiny WORK kl-f8c16 | kl-f8c4 | dc-f32c32 | dc-f64c128 | dc-f128c512
    python -m tools.tiny WORK dc-f64c128-256px | dc-f128c512-256px | dc-f256c2048
    python -m tools.tiny WORK flux-teacher | flux | sana | dit | unet | sana-sprint | kontext-teacher | kontext
    python -m tools.tiny WORK kl-wan | dc-ae-v-f32t4c32 | wan
    python -m tools.tiny WORK assemble WEIGHTS     (the diffusers folders, bfloat16)
    python -m tools.tiny WORK gates                (the figures that the documentation states)

Each part is one command. Its weights (float32) go to WORK. A part needs those before it: kl-f8c4 needs kl-f8c16,
dc-f128c512-256px needs dc-f64c128-256px, dc-f256c2048 needs dc-f128c512-256px, each transformer needs its autoencoder,
flux and kontext need their teachers. The teacher of kontext goes on from the shipped tiny-flux. A part for videos that
was stopped goes on when it is called again: its states (*.state) and the latents of wan lie in WORK until you delete
them.

Six parts do not ship: dc-f128c512, the three for 256 px, unet and sana-sprint. tests/benchmarks/compression_sweep.py,
unet.py and few_steps.py train them. sana-sprint starts from the shipped tiny-sana. dc-f128c512, dc-f64c128-256px and
unet start from the shipped tiny-dc-ae-f64 and f8c4 where WORK has none. tests/benchmarks/editing.py judges kontext.

The shipped weights were made in several runs: tiny-flux was distilled once before its teacher's last two phases, and
tiny-dit began on pictures of every texture and place. A new run gives weights of the same quality, not the same bytes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from tools.tiny import assemble, parts


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    match arguments:
        case [work, "assemble", weights]:
            assemble.write(Path(work), Path(weights))
        case [work, "gates"]:
            assemble.gates(Path(work), log)
        case [work, part] if part in parts.NAMES:
            parts.make(Path(work), part, log)
        case _:
            raise SystemExit(__doc__)


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
