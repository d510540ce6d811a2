"""A short conversion of a tiny model that draws videos: what it reads, the command, and the job of its run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import at_stage
import torch
import warm
from conftest import run_cli
from families.tiny_videos import VIDEOS

from dcgen_convert.cli import app
from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import read_json
from dcgen_convert.core.journal import Run
from dcgen_convert.data import videos
from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo
from dcgen_convert.ranks import join
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages.job import Job, prepare
from dcgen_convert.tiny import videos as world

COUNT, SIDE, C = 8, 64, 8  # videos, their sides in px, channels of the new autoencoder
SETTINGS = {
    "data.buckets": "off", "data.count": COUNT, "data.steps": 2, "data.resolution": SIDE,
    "dtype": "fp32", "align_head.draws": 1, "adapt.zero": 1,
    "adapt.phases.0.resolution": SIDE, "adapt.phases.0.steps": 2, "adapt.phases.0.batch": 2,
    "adapt.phases.0.rank": 4, "adapt.phases.0.warmup": 0, "bundle.steps": 2, "evaluate.prompts": 2,
    "watch.evaluate_every": 2, "watch.grid_every": 2, "watch.pictures": 2,
}  # fmt: skip


def dc_ae_v(factor: int) -> AutoencoderDCVideo:
    """A random DC-AE-V."""
    torch.manual_seed(0)
    stages = factor.bit_length()
    widths = (8,) + (16,) * (stages - 2) + (32,)
    sizes = {"latent_channels": C, "block_out_channels": widths, "layers_per_block": (1,) * stages}
    return AutoencoderDCVideo(**sizes, chunk_frames=8, scaling_factor=0.9)


def lay_out(name: str, root: Path, frames: int, fps: int) -> list[Path]:
    """Into ``root``: ``source``, the tiny model ``name``, and ``videos`` of the tiny world. The files of the videos."""
    VIDEOS[name].build(root / "source")
    (root / "videos").mkdir()
    files = [root / "videos" / f"{place}.mkv" for place in range(COUNT)]
    for place, (file, row) in enumerate(zip(files, world.sample_labels(COUNT, 7), strict=True)):
        videos.write(world.draw(row[None], 7 + place, frames, SIDE)[0], file, fps)
        file.with_suffix(".txt").write_text(world.caption(row.tolist()))
    return files


def command(name: str, where: Path = Path(), source: str | Path = "source", **changes: object) -> list[str]:
    """The conversion of ``name``. where: the folder that `lay_out` has filled, and in which its autoencoder lies."""
    settings = {**SETTINGS, "latents.text_length": VIDEOS[name].length, **changes}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    places = ["--ae", str(where / "ae"), "--data", str(where / "videos"), "-o", "bundle", "--run-dir", "run"]
    return ["convert", str(where / source), "--recipe", "wan-1.3b-480p", *places, "-y", *sets]


def convert(root: Path, *arguments: str) -> str:
    """The command to its end; what it said."""
    done = run_cli(*arguments, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(done.stderr)


def as_two_ranks(root: Path, *arguments: str, stop: tuple[str, int] | None = None) -> list[int]:
    """The command as two ranks, to their end; their exit codes.

    Args:
        stop: (stage, signal) that rank 0 gets in the middle of the stage.
    """
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(join.free_port())}
    first = partial(at_stage.main, *stop) if stop else app.main
    ranks = [
        warm.WarmProcess(main, arguments, warm.environment() | place | {"RANK": rank, "LOCAL_RANK": rank}, root)
        for rank, main in (("0", first), ("1", app.main))
    ]
    try:
        return [rank.wait(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@contextmanager
def job_of(root: Path) -> Iterator[Job]:
    """The job of the run in ``root``. Inside, it is the working directory: the recipe names its folders from there."""
    record, here = read_json(root / "run" / "recipe.json"), os.getcwd()
    os.chdir(root)
    try:
        yield prepare(Resolved(Recipe.model_validate(record["recipe"]), {}), Run(root / "run", NULL), NULL)
    finally:
        os.chdir(here)
