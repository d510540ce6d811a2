"""Merge: fold LoRA and new modules into the dense shards of a transformer folder, one shard in memory at a time.

W' = W + (alpha / rank) B A, computed in float32 and rounded once to the shard's dtype. Every other tensor keeps its
bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcgen_convert import families
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import TEMPORARY, atomic_save, fresh_folder, fsync, read_json

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Update:
    """One low-rank update: W' = W + scale up @ down; ``down`` (r, in, ...), ``up`` (out, r, ...)."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, weight: Tensor) -> Tensor:
        """The update in float32 with the weight's shape, (out, in) or (out, in, kh, kw)."""
        down, up = self.down.float(), self.up.float()
        product = up.flatten(1) @ down.flatten(1)  # a convolution's B is 1 x 1, so this is its composition with A
        return (self.scale * product).reshape(weight.shape)


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
    from safetensors.torch import load_file

    transformer, output = Path(transformer), Path(output)
    shards = shards_of(transformer)
    updates = read_lora(lora, component_of(transformer)) if lora else {}
    replacements = load_file(modules) if modules else {}
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


def read_lora(path: Path, component: str) -> dict[str, Update]:
    """Weight name -> update, of a LoRA file in diffusers format for a pipeline's ``component``.

    Raises:
        InputError: no rank and alpha in the metadata, a variant other than plain LoRA, or a key that is not of LoRA.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if METADATA not in metadata:
        raise InputError(
            f"{path} does not state its rank and alpha",
            hint="save it with save_lora_weights and its metadata",
        )
    config = {key.removeprefix(f"{component}."): value for key, value in json.loads(metadata[METADATA]).items()}
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise InputError(f"{path} uses {key}: only plain LoRA can be merged")
    scale = config["lora_alpha"] / config["r"]
    updates = {}
    for name in tensors:
        match = re.fullmatch(rf"{component}\.(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise InputError(f"{path}: {name} is not a LoRA weight of the {component}")
        partner = name.replace(f"lora_{match[2]}.weight", f"lora_{'B' if match[2] == 'A' else 'A'}.weight")
        if partner not in tensors:
            raise InputError(f"{path}: {name} has no partner {partner}")
        if match[2] == "A":
            updates[f"{match[1]}.weight"] = Update(tensors[name], tensors[partner], scale)
    return updates


def _rewrite(
    shard: Path, target: Path, updates: dict[str, Update], replacements: dict[str, Tensor]
) -> tuple[set[str], int, float]:
    """Write a shard with its part of the changes; one without any is copied byte for byte.

    Returns:
        Names of the changed tensors, number of the others, largest |dW|.
    """
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    changed, largest = tensors.keys() & (updates.keys() | replacements.keys()), 0.0
    for name in changed & replacements.keys():
        tensors[name] = _replaced(name, tensors[name], replacements[name])
    for name in changed & updates.keys():
        tensors[name], delta = _merged(name, tensors[name], updates[name])
        largest = max(largest, delta)
    if changed:
        atomic_save(tensors, target, _one_key(metadata))
    else:
        shutil.copyfile(shard, target)
        fsync(target)
    return changed, len(tensors) - len(changed), largest


def _merged(name: str, weight: Tensor, update: Update) -> tuple[Tensor, float]:
    """(weight plus update in the weight's dtype, largest |dW|)."""
    if weight.shape[0] != update.up.shape[0] or weight[0].numel() != update.down[0].numel():
        lora = f"{tuple(update.up.shape)} x {tuple(update.down.shape)}"
        raise CheckFailed(f"merge: {name} is {tuple(weight.shape)}, but its LoRA is {lora}")
    delta = update.delta(weight)
    if not delta.isfinite().all():
        raise CheckFailed(f"merge: the LoRA of {name} is not finite")
    return (weight.float() + delta).to(weight.dtype), delta.abs().max().item()


def _replaced(name: str, old: Tensor, new: Tensor) -> Tensor:
    if old.shape != new.shape or not new.isfinite().all():
        raise CheckFailed(f"merge: {name} is {tuple(old.shape)}, its replacement is {tuple(new.shape)} or not finite")
    return new.to(old.dtype)


def _one_key(metadata: dict[str, str] | None) -> dict[str, str] | None:
    """Only the key "format", which diffusers reads: with two keys the file's bytes would differ from run to run."""
    return {"format": metadata["format"]} if metadata and "format" in metadata else None


def _put(folder: Path, output: Path) -> None:
    """Rename ``folder`` to ``output``; what was there goes aside first and is deleted last."""
    aside = output.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{output.name}")
    if output.exists():
        os.replace(output, aside)
    os.replace(folder, output)
    fsync(output.parent)
    shutil.rmtree(aside, ignore_errors=True)
