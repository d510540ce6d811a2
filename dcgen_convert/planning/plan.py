"""What a conversion will cost, from configs alone: no weights, no GPU, no torch.

`plan` makes the whole document and `render` shows it; `require_disk` and `fit_phase` are the same arithmetic for a run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dcgen_convert.core.disk import check_disk, existing
from dcgen_convert.data import prompts
from dcgen_convert.families import Family
from dcgen_convert.planning import costs, memory, speed
from dcgen_convert.planning.fit import Fit, decide, head_phase, training
from dcgen_convert.planning.licences import licences
from dcgen_convert.planning.quantised import quantised_linears
from dcgen_convert.planning.shapes import Shapes, shapes_of
from dcgen_convert.planning.text import render
from dcgen_convert.recipe import geometry
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Phase, Recipe
from dcgen_convert.recipe.settings import leaves

__all__ = ["Fit", "fit_phase", "head_phase", "plan", "render", "require_disk"]

GPU_BYTES = memory.GPUS["H100-80"] * memory.GIB


def plan(resolved: Resolved, gpu_bytes: float = GPU_BYTES) -> dict:
    """The plan of a resolved recipe as one JSON-able document; status "feasible" or "infeasible".

    Args:
        gpu_bytes: memory per GPU that training must fit in, in bytes.
    """
    recipe, gpus = resolved.recipe, resolved.machine.gpus or 1
    source = resolved.identity
    sizes = shapes_of(recipe, source)
    last = recipe.adapt.phases[-1]
    trained = sizes.trainable(last)
    fits = [decide(recipe, phase, sizes, gpus, gpu_bytes) for phase in recipe.adapt.phases]
    trains = [decide(recipe, head_phase(recipe), sizes, gpus, gpu_bytes)] if recipe.align_head.steps else []
    problems = list(dict.fromkeys(found.problem for found in [*fits, *trains] if found.problem))
    quantization, impossible = quantised_linears(recipe.quantize, sizes)
    problems += impossible
    space = costs.disk(recipe, sizes)
    fetch = costs.downloads(recipe, sizes)
    doubt = sizes.family.doubt(source.name, source.scheduler or {})
    return {
        "schema": "dcgen.plan/1",
        "status": "infeasible" if problems else "feasible",
        "problems": problems,
        "notes": [*([doubt] if doubt and not last.consistency else []), *_notes(fetch, space, resolved, sizes.family)],
        "source": {
            "name": recipe.source,
            "family": sizes.family.name,
            "licence": source.licence,
            "parameters": sizes.base.parameters,
            **vars(sizes.old),
        },
        "licences": licences(resolved),
        "autoencoder": {"name": recipe.ae, **vars(sizes.new)},
        "tokens": _tokens(resolved, sizes),
        "speedup": speed.speedup(sizes, last.resolution),
        "speedup_paper": speed.measured(sizes.family.name, last.resolution, sizes.new.f),
        "training": {
            "parameters": sizes.converted.parameters,
            "trained": trained.trained,
            "frozen": trained.frozen,
            "lora_linears": trained.linears,
            "text_tokens": sizes.text,
        },
        "memory": _memory(fits[-1], training(recipe, last, sizes), gpu_bytes),
        "quantization": quantization,
        "disk": space,
        "downloads": fetch,
        "time": costs.hours(recipe, sizes),
        "settings": _settings(resolved),
    }


def fit_phase(recipe: Recipe, source: Identity, phase: Phase, gpus: int = 1, gpu_bytes: float = GPU_BYTES) -> Fit:
    """ZeRO stage, offload and micro-batch for one phase on `gpus` GPUs, with the reason; `.problem` when none fits."""
    return decide(recipe, phase, shapes_of(recipe, source), gpus, gpu_bytes)


def require_disk(resolved: Resolved, run_dir: Path, output: Path, until: str | None = None) -> None:
    """Refuse a conversion whose downloads, run folder and bundle would not fit; what the run holds already counts.

    Args:
        until: the last stage that will run; None: all.
    Raises:
        ResourceError: naming the disk, what is needed and what is free.
    """
    kinds = costs.until(
        dict(costs.disk(resolved.recipe, shapes_of(resolved.recipe, resolved.identity))["bytes"]), until
    )
    found = [path.stat() for path in Path(run_dir).rglob("*") if path.is_file()]
    held = sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in found}.values())  # a linked shard counts once
    fetched, bundle = kinds.pop("downloads"), kinds.pop("bundle")
    check_disk([(costs.hub_cache(), fetched), (Path(output), bundle), (Path(run_dir), sum(kinds.values()) - held)])


def _memory(found: Fit, trained: memory.Training, gpu_bytes: float) -> dict:
    """The configuration that the last phase runs with, and the whole table of ZeRO stage x GPUs."""
    decided = {"micro_batch": found.micro_batch, "max_micro_batch": found.limit, "reason": found.reason}
    return {
        "gpu_gib": round(gpu_bytes / memory.GIB, 1),
        "chosen": {**found.memory.gib(), **decided},
        "table": memory.table(trained),
        "basis": "parameter terms measured by tensor census (the moving average is in optim; step is what the update "
        "needs beyond what gradients and activations have given back); activations scaled from FLUX (2.31 GiB per "
        "4,608-token sample); 1.5 GiB + 8 % for context and fragmentation assumed",
    }


def _tokens(resolved: Resolved, sizes: Shapes) -> list[dict]:
    """Image tokens before and after the swap at every resolution, and of every bucket where the recipe has any."""
    recipe = resolved.recipe
    rows = []
    for side in sorted({phase.resolution for phase in recipe.adapt.phases}):
        before, after = sizes.old.tokens(side), sizes.new.tokens(side)
        row: dict[str, Any] = {"resolution": side, "before": before, "after": after, "ratio": before / after}
        rows.append(row)
        if recipe.data.buckets:
            found = geometry.bucket_sizes(sizes.family, sizes.source.config, sizes.old, sizes.new, side)
            row["buckets"] = [
                {"height": h, "width": w, "before": sizes.old.tokens(h, w), "after": sizes.new.tokens(h, w)}
                for h, w in found
            ]
    return rows


def _notes(fetch: list[dict], space: dict, resolved: Resolved, family: Family) -> list[str]:
    """What is experimental, missing or gated, and whether the disk here would do; none of it stops a plan."""
    notes = [family.experimental] if family.experimental else []
    for row in (row for row in fetch if not row["cached"]):
        if row["gated"]:
            notes.append(f"{row['repo']} is gated: accept its licence at {row['accept_at']} and set HF_TOKEN")
        if resolved.machine.offline:
            notes.append(f"offline, and {row['repo']} is not in the cache: fetch it before converting")
    data = resolved.recipe.data
    if data.kind == "folder" and data.path and not Path(data.path).expanduser().exists():
        notes.append(f"data.path {data.path} does not exist yet")
    if (
        data.kind == "synthetic"
        and "class_labels" not in family.text_keys
        and (doubt := prompts.doubt(data.prompts, data.count))
    ):
        notes.append(doubt)
    free = shutil.disk_usage(existing(Path.cwd())).free
    if space["peak"] > free:
        notes.append(f"the disk here is too small: {space['peak'] / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    return notes


def _settings(resolved: Resolved) -> dict:
    values = leaves(resolved.recipe.model_dump(mode="json"))
    return {key: {"value": value, "origin": resolved.origins[key]} for key, value in values}
