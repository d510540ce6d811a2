"""A tiny FLUX, data for it, and a program that adapts it: what the tests of training run, in this process or as real
ranks.

As a program: `python train_worker.py '[{"folder": ..., "adapt": {"zero": 2}}, ...]'` does one job after the other,
one process per rank, RANK and WORLD_SIZE in the environment; an error is one JSON document on stdout.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dcgen_convert import families
from dcgen_convert.core import names
from dcgen_convert.recipe.schema import Adapt, Phase
from dcgen_convert.train.loop import METRICS, Place, Saving
from dcgen_convert.train.phases import Task, adapt_phase, find_start
from dcgen_convert.train.settings import EngineSettings

CHANNELS, SIDE, TEXT, WIDTH = 8, 4, 3, 16
SCHEDULER = {"use_dynamic_shifting": False, "shift": 3.0}
FLUX = families.get("flux")


def tiny_flux(seed: int = 0):
    """FluxTransformer2DModel, 1 double + 1 single block, width 32, guidance input."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


class Rows:
    """Latents and text in memory, with the interface of `LatentCache`."""

    def __init__(self, count: int = 100, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.z = torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator)
        self.text = {
            "encoder_hidden_states": torch.randn(count, TEXT, WIDTH, generator=generator),
            "pooled_projections": torch.randn(count, WIDTH, generator=generator),
        }
        self.null = {key: torch.zeros_like(value[:1]) for key, value in self.text.items()}
        self.spans, self.shapes = [range(count)], [self.z.shape[1:]]

    def __len__(self) -> int:
        return len(self.z)

    def batch(self, indices):
        rows = torch.as_tensor(list(indices))
        return self.z[rows], {key: value[rows] for key, value in self.text.items()}


class MixedRows:
    """Rows of three shapes, one of them with fewer rows than a batch, with the interface of `LatentCache`."""

    def __init__(self, counts=(31, 2, 20), grids=((4, 4), (8, 2), (2, 6)), seed: int = 0):
        parts = [Rows(count, seed + i) for i, count in enumerate(counts)]
        self.z = []
        for part, (height, width) in zip(parts, grids, strict=True):
            generator = torch.Generator().manual_seed(seed + height)
            self.z += torch.randn(len(part), CHANNELS, height, width, generator=generator).unbind(0)
        self.text = {key: torch.cat([part.text[key] for part in parts]) for key in parts[0].text}
        self.null, self.shapes = parts[0].null, [(CHANNELS, *grid) for grid in grids]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        self.spans = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]

    def __len__(self) -> int:
        return len(self.z)

    def batch(self, indices):
        rows = [int(i) for i in indices]
        return torch.stack([self.z[i] for i in rows]), {key: value[rows] for key, value in self.text.items()}


def engine_settings(**changes) -> EngineSettings:
    values = dict(steps=50, lr=3e-3, warmup=5, schedule="cosine", batch=4, micro_batch=4, dtype="fp32", zero=2)
    values |= dict(offload="none", clip=0.0, ema=0.0, checkpointing=False)
    return EngineSettings(**{**values, **changes})


def adapt_section(**changes) -> Adapt:
    values = dict(
        objective="flow",
        null_branch="student",
        guidance_range=(1.0, 5.0),
        shift="model",
        text_drop=0.1,
        ema=0.99,
        optimizer="muon",  # the heads train with AdamW beside it
    )
    values |= dict(clip=1.0, checkpointing=False, zero=2, offload="none", data_guidance=1.0, weighting="none")
    return Adapt(**{**values, **changes}, phases=(phase_section(),))


def phase_section(**changes) -> Phase:
    values = dict(mode="lora", resolution=64, steps=12, rank=4, alpha=8.0, lr=3e-3, warmup=3, schedule="cosine")
    values |= dict(batch=6, micro_batch=6, targets=None, consistency=0.0)
    return Phase(**{**values, **changes})


def adapt(
    folder, *, phase=None, adapt=None, dtype="fp32", saving=(0, 0.0), mixed=False, scheduler=SCHEDULER, held=0,
    late=None, start=False, **more,
):  # fmt: skip
    """`adapt_phase` of a fresh tiny FLUX in ``folder``, on rows of one shape or of several, with ``held`` rows held
    out; on rank ``late`` the deadline has passed, on the others it never will; with ``start`` the LoRA begins along the
    gradient. Returns (metrics, model).
    """
    if late is not None:
        more["deadline"] = 0.0 if os.environ.get("RANK") == str(late) else math.inf
    if held:
        more["held_out"] = Rows(held, seed=1)
    model, section = tiny_flux(), phase_section(**(phase or {}))
    task = Task(model, FLUX, adapt_section(**(adapt or {})), MixedRows() if mixed else Rows(), scheduler)
    place = Place(Path(folder), saving=Saving(*saving), **more)
    file = start_file(folder) if start else None
    if file and not file.exists():
        find_start(replace(task, model=tiny_flux()), section, section.rank, dtype, place)
    return adapt_phase(task, section, dtype, place, file), model


def start_file(folder) -> Path:
    """Where LoRA begins, once it was found."""
    return Path(folder) / names.CHECKPOINTS / names.LORA_START


def losses(folder) -> list[float]:
    """Loss of every step so far, checked to be one line per step."""
    lines = [json.loads(line) for line in (Path(folder) / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def start_ranks(world: int, jobs: list[dict], log: Path) -> list:
    """Start this file as ``world`` real processes that find one another through a free port; stderr goes to ``log``."""
    from warm import WarmProcess, environment, serves

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {key: value for key, value in environment().items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place = {key: str(value) for key, value in place.items()} if world > 1 else {}
        if serves(env):
            ranks.append(WarmProcess(main, [json.dumps(jobs)], env | place, stderr=log))
            continue
        command = [sys.executable, __file__, json.dumps(jobs)]
        with open(log, "ab") as errors:
            pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
            ranks.append(subprocess.Popen(command, env=env | place, **pipes))
    return ranks


def run_ranks(world: int, jobs: list[dict], log: Path, timeout: float = 600) -> list[str]:
    """Run ``world`` ranks to their end; their stdout. AssertionError with the log when one fails."""
    ranks = start_ranks(world, jobs, log)
    outputs = [process.communicate(timeout=timeout)[0] for process in ranks]
    codes = [process.returncode for process in ranks]
    assert codes == [0] * world, f"the ranks ended with {codes}:\n{log.read_text()[-3000:]}"
    return outputs


def main() -> int:
    """The jobs, as one process or as a rank that is bound to the others as in the product; the exit code."""
    from dcgen_convert.cli.session import Session

    torch.set_num_threads(1)
    jobs, session = json.loads(sys.argv[1]), Session(["--json"])
    session.begin(json=True, run_dir=Path(jobs[0]["folder"]).parent / "ranks")
    try:
        crew = session.join()
        for job in jobs:
            adapt(**job)
        code = crew.serve(lambda *task: None) if crew.rank else 0
    except BaseException as error:  # noqa: BLE001  as the command-line does
        code = session.fail(error)
    session.leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
