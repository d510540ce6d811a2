"""Merge: fold LoRA and new modules into the dense shards of a transformer folder, one tensor in memory at a time.

W' = W + (alpha / rank) B A, computed in float32 and rounded once to the shard's dtype. Every other tensor keeps its
bytes.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgen_convert import families
from dcgen_convert.checkpoint import stream
from dcgen_convert.checkpoint.headers import Entry, read_header
from dcgen_convert.checkpoint.stream import CHUNK, Item
from dcgen_convert.checkpoint.tensors import as_bytes, read_tensor
from dcgen_convert.checkpoint.updates import Stored, read_lora
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import TEMPORARY, fresh_folder, fsync, read_json

AT_ONCE = 1 << 26  # numbers of a weight that are computed together: .25 GiB of float32


def merge(
    transformer: Path,
    output: Path,
    *,
    lora: Path | None = None,
    modules: Path | None = None,
    console: Console = NULL,
) -> dict[str, Any]:
    """Write a copy of ``transformer`` with ``lora`` added and the tensors of ``modules`` replaced.

    Args:
        transformer: diffusers folder: config.json, diffusion_pytorch_model*.safetensors, an index when sharded.
        output: folder to write, whole or not at all; a former one is replaced.
        lora: `pytorch_lora_weights.safetensors` as stock pipelines read it, with rank and alpha in its metadata.
        modules: safetensors file of whole tensors under the transformer's own names (embedder, head).
    Returns:
        merged, replaced, untouched (numbers of tensors), max_delta (largest |dW| of the LoRA).
    Raises:
        CheckFailed: nothing to merge, a key that the transformer lacks, a shape that does not fit, or no effect at all.
        InputError: the transformer folder is not one, or the LoRA file lacks rank or alpha.
    """
    transformer, output = Path(transformer), Path(output)
    shards = shards_of(transformer)
    updates = read_lora(lora, component_of(transformer)) if lora else {}
    replacements = read_header(modules)[0] if modules else {}
    if not updates and not replacements:
        raise CheckFailed("merge: 0 tensors to merge", hint="check that the adapt stage wrote its export")
    left = {**dict.fromkeys(updates, "LoRA"), **dict.fromkeys(replacements, "module")}
    largest, untouched = 0.0, 0
    temporary = fresh_folder(output.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{output.name}"))
    try:
        for shard in shards:
            changed, others, delta = _rewrite(shard, temporary / shard.name, updates, replacements)
            left = {name: kind for name, kind in left.items() if name not in changed}
            largest, untouched = max(largest, delta), untouched + others
        if left:
            name, kind = next(iter(left.items()))
            total = len(updates) + len(replacements)
            raise CheckFailed(f"merge: {len(left)} of {total} keys have no place in {transformer}, first {kind} {name}")
        if updates and not largest > 0:
            raise CheckFailed(
                "merge: the LoRA changes nothing (every dW is zero)", hint="look at the adapt stage's metrics"
            )
        for path in transformer.iterdir():
            if path.suffix == ".json":
                shutil.copyfile(path, temporary / path.name)
        fsync(temporary)
        _put(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    console.say(
        f"merged {len(updates)} of {len(updates)} LoRA updates, max |dW| = {largest:.4g}; "
        f"replaced {len(replacements)} tensors, {untouched} untouched"
    )
    return {"merged": len(updates), "replaced": len(replacements), "untouched": untouched, "max_delta": largest}


def shards_of(transformer: Path) -> list[Path]:
    """The dense shards of a diffusers folder, in name order; InputError when it has none or one is missing."""
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    if index.exists():
        shards = sorted({transformer / name for name in read_json(index)["weight_map"].values()})
    else:
        shards = sorted(transformer.glob("diffusion_pytorch_model*.safetensors"))
    if not shards or not (transformer / "config.json").exists():
        raise InputError(f"{transformer} is not a transformer folder: it needs config.json and safetensors weights")
    for shard in shards:
        if not shard.exists():
            raise InputError(
                f"{shard} is named in {index.name} but is not there", hint="download or convert the folder again"
            )
    return shards


def component_of(transformer: Path) -> str:
    """What stock pipelines call the network in a folder; the tensor names of its LoRA begin with it."""
    family = families.recognise(read_json(transformer / "config.json"))
    return families.COMPONENTS[0] if family is None else family.component


def _rewrite(
    shard: Path, target: Path, updates: dict[str, Stored], replacements: dict[str, Entry]
) -> tuple[set[str], int, float]:
    """Write a shard with its part of the changes; one without any is copied byte for byte.

    Returns:
        Names of the changed tensors, number of the others, largest |dW|.
    """
    tensors, _ = read_header(shard)
    changed, deltas = tensors.keys() & (updates.keys() | replacements.keys()), [0.0]
    if not changed:
        shutil.copyfile(shard, target)
        fsync(target)
        return changed, len(tensors), 0.0
    items: dict[str, Item] = {name: Kept(entry.dtype, entry.shape, entry) for name, entry in tensors.items()}
    for name in changed & replacements.keys():
        items[name] = Replaced(*_like(tensors[name]), name, replacements[name])
    for name in changed & updates.keys():
        items[name] = Merged(*_like(tensors[name]), name, tensors[name], updates[name], deltas.append)
    stream.write(target, items, {"format": "pt"})  # what diffusers asks for, and the same bytes in every run
    return changed, len(tensors) - len(changed), max(deltas)


def _like(entry: Entry) -> tuple[str, tuple[int, ...]]:
    return entry.dtype, entry.shape


@dataclass(frozen=True)
class Kept(Item):
    """A tensor whose bytes stay as they are."""

    entry: Entry

    def chunks(self) -> Iterator[bytes]:
        left = self.size
        with open(self.entry.file, "rb", buffering=0) as file:
            file.seek(self.entry.start)
            while chunk := file.read(min(CHUNK, left)):
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class Replaced(Item):
    """A tensor that another one takes the place of, in the dtype of the first."""

    name: str
    new: Entry

    def chunks(self) -> Iterator[memoryview]:
        new = read_tensor(self.new)
        if self.shape != self.new.shape or not new.isfinite().all():
            raise CheckFailed(f"merge: {self.name} is {self.shape}, its replacement is {self.new.shape} or not finite")
        yield as_bytes(new, self.dtype)


@dataclass(frozen=True)
class Merged(Item):
    """A weight with a low-rank update, in the weight's dtype; ``note`` is told the largest |dW|."""

    name: str
    entry: Entry
    update: Stored
    note: Callable[[float], object]

    def chunks(self) -> Iterator[memoryview]:
        down, up = self.update.down.shape, self.update.up.shape
        inputs = math.prod(self.shape[1:])
        if self.shape[0] != up[0] or inputs != math.prod(down[1:]):
            raise CheckFailed(f"merge: {self.name} is {self.shape}, but its LoRA is {up} x {down}")
        rows = max(1, AT_ONCE // inputs)
        for first in range(0, self.shape[0], rows):
            last = min(first + rows, self.shape[0])
            weight = read_tensor(self.entry, first, last)
            total = self.update.read(first, last).delta(weight)
            lowest, highest = (bound.item() for bound in total.aminmax())  # NaN where there is one
            if not math.isfinite(lowest + highest):
                raise CheckFailed(f"merge: the LoRA of {self.name} is not finite")
            self.note(max(-lowest, highest))
            yield as_bytes(total.add_(weight), self.dtype)


def _put(folder: Path, output: Path) -> None:
    """Rename ``folder`` to ``output``; what was there goes aside first and is deleted last."""
    aside = output.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{output.name}")
    if output.exists():
        os.replace(output, aside)
    os.replace(folder, output)
    fsync(output.parent)
    shutil.rmtree(aside, ignore_errors=True)
