"""In which precision each autoencoder works: bfloat16 where that changes no picture visibly, else float32.

It is measured once for each autoencoder, on the first pictures of the run, and written to PRECISION: so every rank,
every stage and every later part of the run takes the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.core.files import read_object, write_json
from dcgen_convert.core.journal import Stage
from dcgen_convert.data import contents
from dcgen_convert.data.images import Picture
from dcgen_convert.evaluation.metrics import psnr_of
from dcgen_convert.networks import autoencoders, pipelines
from dcgen_convert.networks.autoencoders import Codec
from dcgen_convert.networks.pipelines import DTYPES
from dcgen_convert.stages.folders import latents_stage
from dcgen_convert.stages.job import Job

PRECISION = "precision.json"
PICTURES = 4  # that are measured on
HIGHEST_DB = 126.0  # stands for equal round trips: JSON knows no infinity
SAFE_DB = 40.0  # PSNR of the two round trips from which on nobody sees a difference
NAMES = {"base": "the base's autoencoder", "target": "the new autoencoder"}


@dataclass(frozen=True)
class Precision:
    """dtype: "bf16" or "fp32". psnr_db: of a bfloat16 round trip against one in float32; None: not measured."""

    dtype: str
    psnr_db: float | None


def load(job: Job, name: str, dtype: torch.dtype | None = None) -> Codec:
    """The autoencoder "base" or "target" in the precision that was decided on, or in ``dtype``."""
    dtype = dtype or DTYPES[decided(job, name).dtype]
    place: dict[str, Any] = {"device": pipelines.device(), "console": job.console}
    if name == "base":
        return autoencoders.load(job.source.vae, dtype, **place)
    return autoencoders.load(job.target, dtype, scale=job.recipe.latents.scale_override, **place)


def file_of(job: Job) -> Path:
    """The record, beside the latents of the first phase: one for the run."""
    return job.run.path / latents_stage(job.recipe.aligned_set) / PRECISION


def decided(job: Job, name: str) -> Precision:
    """What `decide` wrote; float32 in a run of an earlier version, which did not decide."""
    path = file_of(job)
    return Precision(**read_object(path)[name]) if path.exists() else Precision("fp32", None)


def decide(job: Job, stage: Stage, pictures: list[Picture], views: dict[str, tuple[contents.Size, list[int]]]) -> None:
    """Write PRECISION, if it is not there.

    Args:
        views: autoencoder -> size in px, and the rows of ``pictures`` to measure on.
    """
    path = file_of(job)
    if not path.exists():
        found = {name: _measured(job, name, pictures, *view) for name, view in views.items()}
        write_json(path, {name: asdict(one) for name, one in found.items()})
        for name, one in found.items():
            job.console.say(f"latents: {NAMES[name]} works in {_told(job, one)}")
    for name in views:
        one = decided(job, name)
        stage.metrics[f"precision_{name}"] = one.dtype
        if one.psnr_db is not None:
            stage.metrics[f"psnr_bf16_{name}_db"] = one.psnr_db


def has_bfloat16(device: str) -> bool:
    """Whether the device computes in bfloat16. A CPU with instructions for it gains memory only, and is left out."""
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _measured(job: Job, name: str, pictures: list[Picture], size: contents.Size, rows: list[int]) -> Precision:
    if job.recipe.dtype != "bf16" or not has_bfloat16(pipelines.device()):
        return Precision("fp32", None)
    exact, rounded = load(job, name, torch.float32), load(job, name, torch.bfloat16)
    seen = (contents.read(pictures[row].file, [size], job.fps)[0][None] for row in rows[:PICTURES])
    trips = ((exact.decode(exact.encode(pixels)), rounded.decode(rounded.encode(pixels))) for pixels in seen)
    psnr = min(psnr_of(trips, peak=2.0), HIGHEST_DB)
    return Precision("bf16" if psnr >= SAFE_DB else "fp32", round(psnr, 1))


def _told(job: Job, found: Precision) -> str:
    if found.psnr_db is None:
        why = "the recipe's dtype is fp32" if job.recipe.dtype != "bf16" else "this device does not compute in bfloat16"
        return f"float32: {why}"
    measured = f"a round trip in bfloat16 is {found.psnr_db:g} dB from one in float32"
    return f"bfloat16: {measured}" if found.dtype == "bf16" else f"float32: {measured}, less than {SAFE_DB:g} dB"
