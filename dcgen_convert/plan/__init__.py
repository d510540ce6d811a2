"""What a conversion will cost, from configs alone: no weights, no GPU, no torch.

`plan` makes the whole document and `render` shows it; `require_disk` and `fit_phase` are the same arithmetic for a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from dcgen_convert import catalog
from dcgen_convert.families import Family
from dcgen_convert.plan import costs, memory, speed
from dcgen_convert.plan.fit import Fit, fit, numbers_of, sample_bytes
from dcgen_convert.plan.quantised import quantised
from dcgen_convert.plan.render import render
from dcgen_convert.plan.shapes import Shapes, shapes
from dcgen_convert.recipe import Resolved
from dcgen_convert.schema import Phase, Recipe
from dcgen_convert.settings import leaves

__all__ = ["Fit", "fit_phase", "plan", "render", "require_disk"]

GPU_BYTES = memory.GPUS["H100-80"] * memory.GIB


def plan(resolved: Resolved, gpu_bytes: float = GPU_BYTES) -> dict:
    """The plan of a resolved recipe as one JSON-able document; status "feasible" or "infeasible".

    Args:
        gpu_bytes: memory per GPU that training must fit in, in bytes.
    """
    recipe = resolved.recipe
    sizes = shapes(recipe, resolved.machine.offline)
    last = recipe.adapt.phases[-1]
    trained = sizes.trainable(last)
    entry = catalog.find_source(recipe.source)
    problems = [
        found.problem for phase in recipe.adapt.phases if (found := _fit(resolved, sizes, phase, gpu_bytes)).problem
    ]
    quantization, impossible = quantised(recipe.quantize, sizes)
    problems += impossible
    space = costs.disk(recipe, sizes)
    fetch = costs.downloads(recipe, sizes.base)
    return {
        "schema": "dcgen.plan/1",
        "status": "infeasible" if problems else "feasible",
        "problems": problems,
        "notes": _notes(fetch, space, resolved, sizes.family),
        "source": {
            "name": recipe.source,
            "family": sizes.family.name,
            "licence": entry.licence if entry else None,
            "parameters": sizes.base.parameters,
            **vars(sizes.old),
        },
        "autoencoder": {"name": recipe.ae, **vars(sizes.new)},
        "tokens": _tokens(sizes, {phase.resolution for phase in recipe.adapt.phases}),
        "speedup": speed.speedup(sizes, last.resolution),
        "speedup_paper": speed.measured(sizes.family.name, last.resolution, sizes.new.f),
        "training": {
            "parameters": sizes.converted.parameters,
            "trained": trained.trained,
            "frozen": trained.frozen,
            "lora_linears": trained.linears,
            "text_tokens": sizes.text,
        },
        "memory": _memory(resolved, sizes, gpu_bytes),
        "quantization": quantization,
        "disk": space,
        "downloads": fetch,
        "time": costs.hours(recipe, sizes),
        "settings": _settings(resolved),
    }


def fit_phase(recipe: Recipe, phase: Phase, gpus: int = 1, gpu_bytes: float = GPU_BYTES, offline: bool = False) -> Fit:
    """ZeRO stage, offload and micro-batch for one phase on `gpus` GPUs, with the reason; `.problem` when none fits."""
    sizes = shapes(recipe, offline)
    trained, tokens = sizes.trainable(phase), sizes.tokens(phase)
    return fit(recipe.adapt, phase, sizes.converted, trained, tokens, gpus, gpu_bytes, recipe.dtype)


def require_disk(recipe: Recipe, run_dir: Path, output: Path, offline: bool = False) -> None:
    """Refuse a conversion whose downloads, run folder and bundle would not fit; what the run holds already counts.

    Raises:
        ResourceError: naming the disk, what is needed and what is free.
    """
    kinds = dict(costs.disk(recipe, shapes(recipe, offline))["bytes"])
    held = sum(path.stat().st_size for path in Path(run_dir).rglob("*") if path.is_file())
    fetched, bundle = kinds.pop("downloads"), kinds.pop("bundle")
    costs.check_disk(
        [(costs.hub_cache(), fetched), (Path(output), bundle), (Path(run_dir), sum(kinds.values()) - held)]
    )


def _fit(resolved: Resolved, sizes: Shapes, phase: Phase, gpu_bytes: float) -> Fit:
    recipe, gpus = resolved.recipe, resolved.machine.gpus or 1
    trained, tokens = sizes.trainable(phase), sizes.tokens(phase)
    return fit(recipe.adapt, phase, sizes.converted, trained, tokens, gpus, gpu_bytes, recipe.dtype)


def _memory(resolved: Resolved, sizes: Shapes, gpu_bytes: float) -> dict:
    """The configuration that the last phase runs with, and the whole table of ZeRO stage x GPUs."""
    adapt, dtype = resolved.recipe.adapt, resolved.recipe.dtype
    last = adapt.phases[-1]
    found, trained = _fit(resolved, sizes, last, gpu_bytes), sizes.trainable(last)
    sample = sample_bytes(adapt, sizes.converted, sizes.tokens(last), dtype)
    decided = {"micro_batch": found.micro_batch, "max_micro_batch": found.limit, "reason": found.reason}
    return {
        "gpu_gib": round(gpu_bytes / memory.GIB, 1),
        "chosen": {**found.memory.gib(), **decided},
        "table": memory.table(trained.frozen, trained.trained, sample, numbers_of(adapt, dtype)),
        "basis": "parameter terms measured by tensor census (the moving average is in optim); activations scaled from "
        "FLUX (2.31 GiB per 4,608-token "
        "sample); 1.5 GiB + 8 % for context and fragmentation assumed",
    }


def _tokens(sizes: Shapes, sides: Iterable[int]) -> list[dict]:
    rows = []
    for side in sorted(sides):
        before, after = sizes.old.tokens(side), sizes.new.tokens(side)
        rows.append({"resolution": side, "before": before, "after": after, "ratio": before / after})
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
    if data.kind == "folder" and not Path(data.path).expanduser().exists():
        notes.append(f"data.path {data.path} does not exist yet")
    free = shutil.disk_usage(costs.existing(Path.cwd())).free
    if space["peak"] > free:
        notes.append(f"the disk here is too small: {space['peak'] / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    return notes


def _settings(resolved: Resolved) -> dict:
    values = leaves(resolved.recipe.model_dump(mode="json"))
    return {key: {"value": value, "origin": resolved.origins[key]} for key, value in values}
