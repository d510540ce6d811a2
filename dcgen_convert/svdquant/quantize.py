"""Quantise a diffusers transformer folder into nunchaku_lite form (nunchaku's file format), block by block, resumable.

Beside the output a hidden work folder grows: a weight file and a JSON neighbour per finished block, the block outputs
that the next block starts from, and the statistics of blocks in work. When every block is there the output folder is
put together and renamed.

Blocks run one after the other, on what the dense blocks before them return; what costs the time, quantising them, needs
their statistics alone. So several ranks take turns at running a block and quantise theirs at the same time.
"""

import ctypes
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_save, read_json, write_json
from dcgen_convert.ranks.crew import SOLO, Crew
from dcgen_convert.svdquant.assemble import assemble
from dcgen_convert.svdquant.awq import AwqLinear, quantize_awq
from dcgen_convert.svdquant.calibrate import Call, Walker, holding_list, repeated_blocks, run_dtype
from dcgen_convert.svdquant.job import Job, Targets
from dcgen_convert.svdquant.layer import SvdqLinear, quantize_linears
from dcgen_convert.svdquant.settings import Settings
from dcgen_convert.svdquant.skeleton import build, load
from dcgen_convert.svdquant.source import read_folder
from dcgen_convert.svdquant.spool import Spool
from dcgen_convert.svdquant.stats import Stats
from dcgen_convert.svdquant.stats import load as load_stats
from dcgen_convert.svdquant.stats import save as save_stats
from dcgen_convert.svdquant.tensors import awq_spec, check_round_trip, check_tensors, pack_awq, pack_svdq, svdq_spec

TURN = 0.1  # seconds between two looks at whose turn it is
M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


def quantize(
    source: Path,
    output: Path,
    targets: Targets,
    settings: Settings,
    calls: Sequence[Call],
    console: Console,
    crew: Crew = SOLO,
) -> list[dict]:
    """Write `output`, a diffusers transformer folder with 4-bit targets, from `source`; return one record per layer.

    calls: keyword arguments of the transformer's forward, in memory or as safetensors files; empty only with
    calibration "none". crew: other ranks, which call `work` with the same job and the arguments that they are given.
    Same inputs, settings and machine give the same bytes, whatever the ranks; an interrupted run goes on at the block
    where it stopped.
    Errors: InputError before any work, naming the tensor, for a target that is absent or has a shape that the format
    cannot hold, and for NaN or infinite values anywhere in the source. An existing `output` is refused.
    """
    if output.exists():
        raise InputError(f"{output} exists already.", hint="Remove it or choose another folder.")
    job = open_job(source, output, targets, settings, calls)
    job.check()
    job.open(console)
    blocks = _targets_by_block(build(job.config), targets)
    left = [block for block in blocks if not job.records_file(block).is_file()]
    if len(left) < len(blocks):
        console.say(f"quantize: {len(blocks) - len(left)} of {len(blocks)} blocks are already done")
    begun = {"left": left, "walked": job.walked()}
    with console.progress("quantize", len(blocks), "block") as bar:
        bar.advance(len(blocks) - len(left))
        with crew.share("blocks", bar, **begun):
            work(job, console, bar, (crew.rank, crew.world), **begun)
    records = [record for block in blocks for record in read_json(job.records_file(block))]
    order = {name: number for number, name in enumerate((*targets.svdq, *targets.awq))}
    records.sort(key=lambda record: order[record["module"]])
    assemble(job, output, records)
    return records


def return_freed_memory() -> None:
    """Have the C library give memory of 2 MB and more back when it is freed.

    glibc raises its threshold with every such block that is freed, up to 32 MB, and keeps what is smaller in its heap:
    0.3 GB of holes after one block of FLUX. Other C libraries have no such threshold.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 2 << 20)


def open_job(source: Path, output: Path, targets: Targets, settings: Settings, calls: Sequence[Call]) -> Job:
    """The job of `quantize` with these arguments; nothing is checked or written."""
    return Job(*read_folder(source), targets, settings, calls, output.with_name(f".{output.name}.partial"))


def work(
    job: Job, console: Console, bar: Any, share: tuple[int, int], left: Sequence[str], walked: Sequence[str]
) -> None:
    """Finish this rank's part of the blocks.

    share: (rank, ranks); each runs every ``ranks``-th block. left, walked: blocks that are not finished, and those that
    were run, when the work began.
    """
    return_freed_memory()
    rank, ranks = share
    model = build(job.config)
    blocks = _targets_by_block(model, job.targets)

    def finish(block: str, stats: dict[str, Stats]) -> None:
        for record in _finish_block(job, block, blocks[block], stats):
            console.event("quantized", **record)
        bar.advance(1, block=block)

    targets, device, rest = job.targets.svdq, job.settings.device, list(left)
    if job.settings.calibration == "calls" and targets:
        for block in [block for block in left if block in walked][rank::ranks]:
            finish(block, load_stats(job.stats_file(block), device))
        walker = _walker(job, model, walked)
        while walker.needed(targets):
            run = job.walked()
            walker.catch_up(run)
            if (len(run) - len(walked)) % ranks != rank:
                time.sleep(TURN)
            elif walker.needed(targets):
                block, stats = walker.step(targets)
                save_stats(stats, job.stats_file(block))
                job.mark_walked(block)
                walker.finish(block)
                if block in left:
                    finish(block, stats)
        rest = [block for block in left if block not in job.walked()]
    for block in rest[rank::ranks]:  # they need no data
        finish(block, {})


def _targets_by_block(model: torch.nn.Module, targets: Targets) -> dict[str, list[str]]:
    """Block path (for a layer outside every block its own path) -> its targets."""
    blocks: dict[str, list[str]] = {}
    for name in (*targets.svdq, *targets.awq):
        holder = holding_list(model, name)
        block = name if holder is None else ".".join(name.split(".")[: holder.count(".") + 2])
        blocks.setdefault(block, []).append(name)
    return blocks


def _walker(job: Job, model: torch.nn.Module, walked: Sequence[str]) -> Walker:
    blocks = repeated_blocks(model, job.targets.svdq, job.targets.blocks)
    load(model, "", job.entries, job.settings.device, run_dtype(job.settings.device), skip=tuple(blocks))
    return Walker(model, blocks, job.entries, job.calls, Spool(job.work / "outputs"), job.settings, walked)


def _finish_block(job: Job, block: str, names: list[str], stats: dict[str, Stats]) -> list[dict]:
    """Quantise the targets of one block, check them, and keep them: tensors first, records (the marker) last."""
    tensors, records = {}, []
    for group in _groups(job, names, stats):
        began = time.monotonic()
        layers = _quantize_group(job, group, stats.get(group[0]))
        seconds = round((time.monotonic() - began) / len(group), 2)
        for name, layer in zip(group, layers, strict=True):
            tensors |= {f"{name}.{part}": tensor for part, tensor in _checked(job, name, layer).items()}
            records.append(layer.record | {"seconds": seconds})
    atomic_save(tensors, job.tensors_file(block), {"format": "pt"})
    write_json(job.records_file(block), records)
    job.stats_file(block).unlink(missing_ok=True)
    return records


def _groups(job: Job, names: list[str], stats: dict[str, Stats]) -> list[list[str]]:
    """Layers that are quantised together: under the setting `fuse_qkv` those of one module with one input, such as an
    attention's q, k and v; else each alone.
    """
    if not job.settings.fuse_qkv or not stats:
        return [[name] for name in names]
    groups: dict[tuple, list[str]] = {}
    for name in names:
        key = (name.rpartition(".")[0], id(stats[name])) if name in stats else (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _quantize_group(job: Job, names: list[str], stats: Stats | None) -> list[SvdqLinear] | list[AwqLinear]:
    weights = [job.entries[f"{name}.weight"].read().to(job.settings.device) for name in names]
    biases = [job.entries[f"{name}.bias"].read() if f"{name}.bias" in job.entries else None for name in names]
    if names[0] in job.targets.awq:
        return [quantize_awq(*layer) for layer in zip(names, weights, biases, strict=True)]
    seed = int.from_bytes(hashlib.sha256(f"{job.settings.seed}:{names[0]}".encode()).digest()[:6], "little")
    return quantize_linears(names, weights, biases, stats, job.settings, torch.Generator().manual_seed(seed))


def _checked(job: Job, name: str, layer: SvdqLinear | AwqLinear) -> dict[str, torch.Tensor]:
    """The layer's checkpoint tensors after the self-check on write."""
    shape, biased = job.entries[f"{name}.weight"].shape, f"{name}.bias" in job.entries
    if isinstance(layer, AwqLinear):
        tensors, spec = pack_awq(layer), awq_spec(shape, biased)
    else:
        tensors, spec = pack_svdq(layer), svdq_spec(shape, job.settings.precision, job.settings.rank, biased)
    check_tensors(name, tensors, spec)
    check_round_trip(name, layer, tensors)
    return tensors
