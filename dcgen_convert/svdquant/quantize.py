"""Quantise a diffusers transformer folder into nunchaku_lite form (nunchaku's file format) or into plain NVFP4 (the
form `bfl`), block by block.

A hidden work folder grows beside the output. It holds a weight file and a JSON file per finished block, the block
outputs that the next block starts from, and the statistics of blocks in work. When every block is there, the output
folder is put together and renamed. An interrupted run goes on from the work folder.

A block runs on what the dense blocks before it return, so the blocks run one after the other. Quantising a block takes
most of the time, and needs only the block's statistics. So several ranks take turns at running a block, and quantise
their blocks at the same time.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dcgen_convert.checkpoint.tensors import read_tensor
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_save, read_json, write_json
from dcgen_convert.core.progress import Bar
from dcgen_convert.families import QuantTargets
from dcgen_convert.ranks.crew import SOLO, Crew
from dcgen_convert.svdquant.assemble import assemble
from dcgen_convert.svdquant.awq import AwqLinear, quantize_awq
from dcgen_convert.svdquant.calibrate import Call, Walker, holding_list, repeated_blocks, run_dtype
from dcgen_convert.svdquant.layer import quantize_linears
from dcgen_convert.svdquant.plain import PlainLinear, pack_plain, plain_spec, quantize_plain
from dcgen_convert.svdquant.quantisation import Quantisation
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.skeleton import build, load
from dcgen_convert.svdquant.spool import Spool
from dcgen_convert.svdquant.stats import Stats
from dcgen_convert.svdquant.stats import load as load_stats
from dcgen_convert.svdquant.stats import save as save_stats
from dcgen_convert.svdquant.tensors import (
    Layer,
    awq_spec,
    check_round_trip,
    check_tensors,
    pack_awq,
    pack_svdq,
    svdq_spec,
)

TURN = 0.1  # seconds between two looks at whose turn it is
M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


def quantize(
    source: Path,
    output: Path,
    targets: QuantTargets,
    settings: QuantSettings,
    calls: Sequence[Call],
    console: Console,
    crew: Crew = SOLO,
) -> list[dict[str, Any]]:
    """Write `output`, a diffusers transformer folder with 4-bit targets, from `source`; return one record per layer.

    calls: keyword arguments of the transformer's forward, in memory or as safetensors files; empty only with
    calibration "none". crew: other ranks, which call `work` with the same quantisation and the arguments that they are
    given. The same inputs, settings and machine give the same bytes, whatever the ranks. An interrupted run goes on at
    the block where it stopped.
    Errors: InputError before any work, with the name of the tensor, for a target that is absent or has a shape that the
    format cannot hold, and for NaN or infinite values anywhere in the source. An existing `output` is refused.
    """
    if output.exists():
        raise InputError(f"{output} exists already.", hint="Remove it or choose another folder.")
    quantisation = Quantisation.of_folder(source, output, targets, settings, calls)
    quantisation.make_work_folder(quantisation.check(), console)
    blocks = _targets_by_block(build(quantisation.config), targets)
    left = [block for block in blocks if not quantisation.records_file(block).is_file()]
    if len(left) < len(blocks):
        console.say(f"quantize: {len(blocks) - len(left)} of {len(blocks)} blocks are already done")
    begun: dict[str, Any] = {"left": left, "walked": quantisation.walked()}
    with console.progress("quantize", len(blocks), "block") as bar:
        bar.advance(len(blocks) - len(left))
        with crew.share("blocks", bar, **begun):
            work(quantisation, console, bar, (crew.rank, crew.world), **begun)
    records = [record for block in blocks for record in read_json(quantisation.records_file(block))]
    order = {name: number for number, name in enumerate((*targets.svdq, *targets.awq))}
    records.sort(key=lambda record: order[record["module"]])
    assemble(quantisation, output, records)
    return records


def return_freed_memory() -> None:
    """Make the C library return memory of 2 MB and more when it is freed.

    glibc raises its threshold with every such block that is freed, up to 32 MB, and keeps smaller blocks in its heap:
    0.3 GB of holes after one block of FLUX. Other C libraries have no such threshold.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 2 << 20)


def work(
    quantisation: Quantisation,
    console: Console,
    bar: Bar,
    part: tuple[int, int],
    left: Sequence[str],
    walked: Sequence[str],
) -> None:
    """Finish this rank's part of the blocks.

    part: (rank, ranks); a rank takes every ``ranks``-th block. left, walked: when the work began, the blocks that were
    not finished, and those that were run.
    """
    return_freed_memory()
    worker, (rank, ranks) = _Worker(quantisation, console, bar), part
    rest = list(left)
    if quantisation.settings.calibration == "calls" and quantisation.targets.svdq:
        for block in [block for block in left if block in walked][rank::ranks]:
            worker.finish(block, load_stats(quantisation.stats_file(block), quantisation.settings.device))
        worker.walk(part, left, walked)
        rest = [block for block in left if block not in quantisation.walked()]
    for block in rest[rank::ranks]:  # they need no data
        worker.finish(block, {})


class _Worker:
    """Runs and finishes blocks of one quantisation, on one rank."""

    def __init__(self, quantisation: Quantisation, console: Console, bar: Bar) -> None:
        self.quantisation, self.console, self.bar = quantisation, console, bar
        self.model = build(quantisation.config)
        self.blocks = _targets_by_block(self.model, quantisation.targets)

    def finish(self, block: str, stats: dict[str, Stats]) -> None:
        """Quantise a block, and say so."""
        for record in _finish_block(self.quantisation, block, self.blocks[block], stats):
            self.console.event("quantized", **record)
        self.bar.advance(1, block=block)

    def walk(self, part: tuple[int, int], left: Sequence[str], walked: Sequence[str]) -> None:
        """Run blocks in turns with the other ranks, and finish those of them that are in ``left``.

        The ranks send each other nothing: the list of blocks that were run, in the work folder, says whose turn it is.
        """
        quantisation, targets, (rank, ranks) = self.quantisation, self.quantisation.targets.svdq, part
        walker = _walker(quantisation, self.model, walked)
        while walker.needed(targets):
            run = quantisation.walked()
            walker.catch_up(run)
            if (len(run) - len(walked)) % ranks != rank:
                time.sleep(TURN)
            elif walker.needed(targets):
                block, stats = walker.step(targets)
                save_stats(stats, quantisation.stats_file(block))
                quantisation.mark_walked(block)
                walker.finish(block)
                if block in left:
                    self.finish(block, stats)


def _targets_by_block(model: torch.nn.Module, targets: QuantTargets) -> dict[str, list[str]]:
    """Block path (for a layer outside every block its own path) -> its targets."""
    blocks: dict[str, list[str]] = {}
    for name in (*targets.svdq, *targets.awq):
        holder = holding_list(model, name)
        block = name if holder is None else ".".join(name.split(".")[: holder.count(".") + 2])
        blocks.setdefault(block, []).append(name)
    return blocks


def _walker(quantisation: Quantisation, model: torch.nn.Module, walked: Sequence[str]) -> Walker:
    entries, settings = quantisation.entries, quantisation.settings
    blocks = repeated_blocks(model, quantisation.targets.svdq, quantisation.targets.blocks)
    load(model, "", entries, settings.device, run_dtype(settings.device), skip=tuple(blocks))
    return Walker(model, blocks, entries, quantisation.calls, Spool(quantisation.work / "outputs"), settings, walked)


def _finish_block(
    quantisation: Quantisation, block: str, names: list[str], stats: dict[str, Stats]
) -> list[dict[str, Any]]:
    """Quantise the targets of one block, check them, and keep them: tensors first, records (the marker) last."""
    tensors: dict[str, torch.Tensor] = {}
    records: list[dict[str, Any]] = []
    for group in _groups(quantisation, names, stats):
        began = time.monotonic()
        layers = _quantize_group(quantisation, group, stats.get(group[0]))
        seconds = round((time.monotonic() - began) / len(group), 2)
        for name, layer in zip(group, layers, strict=True):
            tensors |= {f"{name}.{part}": tensor for part, tensor in _checked(quantisation, name, layer).items()}
            records.append(layer.record | {"seconds": seconds})
    atomic_save(tensors, quantisation.tensors_file(block), {"format": "pt"})
    write_json(quantisation.records_file(block), records)
    quantisation.stats_file(block).unlink(missing_ok=True)
    return records


def _groups(quantisation: Quantisation, names: list[str], stats: dict[str, Stats]) -> list[list[str]]:
    """Layers that are quantised together. With the setting `fuse_qkv` these are the layers of one module with one
    input, such as an attention's q, k and v; otherwise each layer stands alone.
    """
    if not quantisation.settings.fuse_qkv or not stats:
        return [[name] for name in names]
    groups: dict[tuple[str | int, ...], list[str]] = {}
    for name in names:
        key = (name.rpartition(".")[0], id(stats[name])) if name in stats else (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _quantize_group(quantisation: Quantisation, names: list[str], stats: Stats | None) -> Sequence[Layer]:
    entries, settings = quantisation.entries, quantisation.settings
    weights = [read_tensor(entries[f"{name}.weight"]).to(settings.device) for name in names]
    biases = [read_tensor(entries[f"{name}.bias"]) if f"{name}.bias" in entries else None for name in names]
    if names[0] in quantisation.targets.awq:
        return [quantize_awq(*layer) for layer in zip(names, weights, biases, strict=True)]
    if settings.plain:
        assert stats is not None and len(names) == 1, names  # they are calibrated, and none shares anything
        return [quantize_plain(names[0], weights[0], biases[0], stats, settings)]
    seed = int.from_bytes(hashlib.sha256(f"{settings.seed}:{names[0]}".encode()).digest()[:6], "little")
    return quantize_linears(names, weights, biases, stats, settings, torch.Generator().manual_seed(seed))


def _checked(quantisation: Quantisation, name: str, layer: Layer) -> dict[str, torch.Tensor]:
    """The layer's checkpoint tensors after the self-check on write."""
    entries, settings = quantisation.entries, quantisation.settings
    n, k = entries[f"{name}.weight"].shape
    biased = f"{name}.bias" in entries
    if isinstance(layer, AwqLinear):
        tensors, spec = pack_awq(layer), awq_spec((n, k), biased)
    elif isinstance(layer, PlainLinear):
        tensors, spec = pack_plain(layer), plain_spec((n, k), biased)
    else:
        tensors, spec = pack_svdq(layer), svdq_spec((n, k), settings.precision, settings.rank, biased)
    check_tensors(name, tensors, spec)
    check_round_trip(name, layer, tensors)
    return tensors
