"""Quantise a diffusers transformer folder into nunchaku_lite form (nunchaku's file format), block by block, resumable.

Beside the output a hidden work folder grows: a weight file and a JSON neighbour per finished block, and the block
outputs that the next block starts from. When every block is there the output folder is put together and renamed.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dcgen_convert.console import Console
from dcgen_convert.errors import InputError
from dcgen_convert.files import atomic_save, read_json, write_json
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
from dcgen_convert.svdquant.tensors import awq_spec, check_round_trip, check_tensors, pack_awq, pack_svdq, svdq_spec


def quantize(
    source: Path, output: Path, targets: Targets, settings: Settings, calls: Sequence[Call], console: Console
) -> list[dict]:
    """Write `output`, a diffusers transformer folder with 4-bit targets, from `source`; return one record per layer.

    calls: keyword arguments of the transformer's forward, in memory or as safetensors files; empty only with
    calibration "none". Same inputs, settings and machine give the same bytes; an interrupted run goes on at the block
    where it stopped.
    Errors: InputError before any work, naming the tensor, for a target that is absent or has a shape that the format
    cannot hold, and for NaN or infinite values anywhere in the source. An existing `output` is refused.
    """
    config, entries = read_folder(source)
    if output.exists():
        raise InputError(f"{output} exists already.", hint="Remove it or choose another folder.")
    job = Job(config, entries, targets, settings, calls, output.with_name(f".{output.name}.partial"))
    job.check()
    job.open(console)
    records = _run(job, console)
    assemble(job, output, records)
    return records


def _run(job: Job, console: Console) -> list[dict]:
    """Finish every block; return all records in target order."""
    model = build(job.config)
    blocks = _targets_by_block(model, job.targets)
    left = [block for block in blocks if not job.records_file(block).is_file()]
    if len(left) < len(blocks):
        console.say(f"quantize: {len(blocks) - len(left)} of {len(blocks)} blocks are already done")
    with console.progress("quantize", len(blocks), "block") as bar:
        bar.advance(len(blocks) - len(left))
        for block, stats in _walk(job, model, left):
            for record in _finish_block(job, block, blocks[block], stats):
                console.event("quantized", **record)
            bar.advance(1, block=block)
    records = [record for block in blocks for record in read_json(job.records_file(block))]
    order = {name: number for number, name in enumerate((*job.targets.svdq, *job.targets.awq))}
    return sorted(records, key=lambda record: order[record["module"]])


def _targets_by_block(model: torch.nn.Module, targets: Targets) -> dict[str, list[str]]:
    """Block path (for a layer outside every block its own path) -> its targets."""
    blocks: dict[str, list[str]] = {}
    for name in (*targets.svdq, *targets.awq):
        holder = holding_list(model, name)
        block = name if holder is None else ".".join(name.split(".")[: holder.count(".") + 2])
        blocks.setdefault(block, []).append(name)
    return blocks


def _walk(job: Job, model: torch.nn.Module, left: list[str]) -> Iterator[tuple[str, dict[str, Stats]]]:
    """Yield (block, {W4A4 target: statistics}) for what is left: in forward order, then what needs no data."""
    if job.settings.calibration == "none" or not job.targets.svdq:
        yield from ((block, {}) for block in left)
        return
    blocks = repeated_blocks(model, job.targets.svdq, job.targets.blocks)
    load(model, "", job.entries, job.settings.device, run_dtype(job.settings.device), skip=tuple(blocks))
    spool = Spool(job.work / "outputs")
    walker = Walker(model, blocks, job.entries, job.calls, spool, job.settings, job.walked())
    seen = set()
    for block, stats in walker.walk(job.targets.svdq):
        seen.add(block)
        if block in left:
            yield block, stats
        job.mark_walked(block)
    yield from ((block, {}) for block in left if block not in seen)


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
    return records


def _groups(job: Job, names: list[str], stats: dict[str, Stats]) -> list[list[str]]:
    """Layers that are quantised together: under the setting `share` those of one module with one input, such as an
    attention's q, k and v; else each alone.
    """
    if not job.settings.share or not stats:
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
