"""The keyword arguments of the API. Light: the command line imports it to parse its options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict


class Settings(TypedDict, total=False):
    """Settings of a conversion. Each is the option of `dcgen-convert convert` with the same name; None, or left out,
    means the recipe's.

    ae: autoencoder to convert to: alias, folder, hub id, or "FILE.safetensors:ALIAS".
    ae_channels: use the first K latent channels only.
    recipe: recipe for a source that is a model (name or file).
    base: pipeline that completes a source which is a transformer alone (folder or hub id).
    loras: LoRA files to fuse into the source first, "FILE" or "FILE:SCALE".
    sets: any settings as "key=value", for example "adapt.ema=0".
    quantize: 4-bit format of the result; "none" disables.
    merge_lora: True adds the LoRA to the weights, False keeps it in a file of its own.
    layout: pipeline class of the bundle.
    data: your pictures: a folder, a .jsonl, shards or hf://datasets/ORG/NAME; or several, "PATH=SHARE" each.
    prompts: of the pictures that are drawn: FILE.txt, FILE:COLUMN of a table, or hf://datasets/ORG/NAME:COLUMN.
    resolution: picture side of the last phase in px.
    dtype: number type in training. seed: of every random draw.
    zero: ZeRO stage; "auto" takes the smallest that fits. offload: what is kept in host memory.
    revision: git revision of the source on the hub.
    gpus: number of ranks on this host. hostfile: DeepSpeed hostfile of several hosts.
    max_gpu_hours: GPU-hours that the whole conversion may take; 0: the recipe as written, without a budget.
    hours: the same in hours of wall-clock.
    offline: use local files and the cache only.
    """

    ae: str | None
    ae_channels: int | None
    recipe: str | None
    base: str | None
    loras: Sequence[str]
    sets: Sequence[str]
    quantize: Literal["none", "nvfp4", "int4"] | None
    merge_lora: bool | None
    layout: Literal["stock", "official"] | None
    data: str | Path | Sequence[str | Path] | None
    prompts: str | Path | None
    resolution: int | None
    dtype: Literal["fp32", "bf16"] | None
    seed: int | None
    zero: Literal["auto", "0", "1", "2", "3"] | int | None
    offload: Literal["none", "optimizer", "all"] | None
    revision: str | None
    gpus: int | None
    hostfile: str | Path | None
    max_gpu_hours: float | None
    hours: float | None
    offline: bool


class JobSettings(Settings, total=False):
    """`Settings`, and how a job is watched.

    track: send curves and pictures there too. rank_timeout: seconds without a sign of life, or without
    progress, after which a rank ends the job, 0 disables. restarts: how often the ranks start again after a crash.
    check: compare what the finished stages wrote with its hashes before it is used; None: yes.
    """

    track: Literal["tensorboard", "wandb"] | None
    rank_timeout: float | None
    restarts: int | None
    check: bool | None


JOB = tuple(name for name in JobSettings.__annotations__ if name not in Settings.__annotations__)
