"""What a conversion will cost, from configs alone: no weights, no GPU, no torch.

`plan` makes the whole document and `render` shows it; `require_disk` and `fit_phase` are the same arithmetic for a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcgen_convert.core.disk import check_disk
from dcgen_convert.core.errors import DcgenError, ResourceError
from dcgen_convert.core.journal import removed
from dcgen_convert.data import prompts
from dcgen_convert.families import Family
from dcgen_convert.families.grid import STILL, Grid
from dcgen_convert.planning import costs, memory, speed, stage_memory
from dcgen_convert.planning.absent import absent
from dcgen_convert.planning.bill import bill, device_for
from dcgen_convert.planning.fit import Fit, decide, head_phase, training
from dcgen_convert.planning.impossible import impossible
from dcgen_convert.planning.licences import licences
from dcgen_convert.planning.present import counted
from dcgen_convert.planning.quantised import quantised_linears
from dcgen_convert.planning.rates import CPUS
from dcgen_convert.planning.rehearsal import Rehearsal
from dcgen_convert.planning.shapes import Shapes, shapes_of
from dcgen_convert.planning.start import group_bytes
from dcgen_convert.planning.text import render
from dcgen_convert.ranks import hosts
from dcgen_convert.recipe import drawable, geometry
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.paired import told
from dcgen_convert.recipe.pictures import Data
from dcgen_convert.recipe.schema import Phase, Recipe
from dcgen_convert.recipe.settings import leaves

__all__ = [
    "Fit", "fit_phase", "head_phase", "plan", "render", "require_disk", "require_fits",
    "start_bytes",
]  # fmt: skip

GPU_BYTES = memory.GPUS["H100-80"] * memory.GIB


def plan(
    resolved: Resolved,
    gpu_bytes: float = GPU_BYTES,
    disk_bytes: float | None = None,
    found: Rehearsal | None = None,
) -> dict:
    """The plan of a resolved recipe as one JSON-able document; status "feasible" or "infeasible".

    Args:
        gpu_bytes: memory per GPU that training must fit in, in bytes.
        disk_bytes: free disk space of the machine that will convert; None: not known, and not judged.
        found: what a rehearsal measured.
    """
    gpus, source = hosts.world_of(resolved.machine), resolved.identity
    recipe, fewer = counted(resolved.recipe, source)
    sizes = shapes_of(recipe, source)
    last = recipe.adapt.phases[-1]
    trained = sizes.trainable(last)
    fits = _fits(recipe, sizes, gpus, gpu_bytes)
    quantization, _ = quantised_linears(recipe.quantize, sizes)
    space = costs.disk(recipe, sizes)
    frames = geometry.training_frames(recipe, source)
    problems = [*absent(recipe, frames, source.fps), *impossible(recipe, sizes), *_too_large(fits)]
    problems += [*_too_heavy(recipe, sizes, fits, gpu_bytes), *_too_full(space["peak"], disk_bytes)]
    fetch = costs.downloads(recipe, sizes)
    doubt = sizes.family.doubt(source.name, source.scheduler or {})
    return {
        "schema": "dcgen.plan/2",
        "status": "infeasible" if problems else "feasible",
        "problems": [f"{problem.message}: {problem.hint}" for problem in problems],
        "exit_code": problems[0].exit_code if problems else 0,
        "notes": [
            *([doubt] if doubt and not last.consistency else []),
            *fewer,
            *_notes(fetch, resolved, sizes),
            *_paired(recipe, sizes),
        ],
        "source": {
            "name": recipe.source,
            "family": sizes.family.name,
            "licence": source.licence,
            "parameters": sizes.base.parameters,
            "networks": sizes.networks,
            **_grid(sizes.old),
        },
        "licences": licences(resolved),
        "autoencoder": {"name": recipe.ae, **_grid(sizes.new)},
        "tokens": _tokens(resolved, sizes),
        "alignment": {**vars(sizes.alignment), "told": sizes.alignment.told},
        "speedup": speed.speedup(sizes, last.resolution),
        "speedup_paper": speed.measured(sizes.family.name, last.resolution, sizes.new.f),
        "training": {
            "parameters": sizes.converted.parameters,
            "trained": trained.trained,
            "frozen": trained.frozen,
            "lora_linears": trained.linears,
            "text_tokens": sizes.text,
        },
        "memory": {
            **_memory(fits[-1], training(recipe, last, sizes), gpu_bytes),
            "stages": _stages_memory(recipe, sizes, fits, found),
        },
        "quantization": quantization,
        "disk": space,
        "downloads": fetch,
        "time": bill(recipe, sizes, gpus, found),
        "budget": {**recipe.budget.model_dump(mode="json"), "derivation": [*resolved.derivation]},
        "settings": _settings(resolved),
    }


def require_fits(recipe: Recipe, source: Identity, gpus: int, gpu_bytes: float) -> None:
    """ResourceError when a training does not fit on ``gpus`` ranks of ``gpu_bytes`` each: said before it is reached."""
    for problem in _too_large(_fits(recipe, shapes_of(recipe, source), gpus, gpu_bytes)):
        raise problem


def _fits(recipe: Recipe, sizes: Shapes, gpus: int, gpu_bytes: float) -> list[Fit]:
    """The decision for each training: that of the head, if there is one, then the phases."""
    phases = [*([head_phase(recipe)] if recipe.align_head.steps else []), *recipe.adapt.phases]
    return [decide(recipe, phase, sizes, gpus, gpu_bytes) for phase in phases]


def _too_large(fits: list[Fit]) -> list[DcgenError]:
    """Trainings that do not fit into the GPUs, each once."""
    found = dict.fromkeys(fit.problem for fit in fits if fit.problem)
    return [ResourceError(*problem) for problem in found]


def _too_heavy(recipe: Recipe, sizes: Shapes, fits: list[Fit], gpu_bytes: float) -> list[DcgenError]:
    """Stages whose networks leave no room for a single picture on a GPU. Trainings are judged by their own fit."""
    if device_for(sizes) is CPUS:
        return []
    return [
        ResourceError(
            f"stage {need.stage} needs {need.gpu(1) / memory.GIB:.1f} GiB for one picture, and a GPU has "
            f"{gpu_bytes / memory.GIB:.1f} GiB",
            "use a GPU with more memory",
        )
        for need in stage_memory.needs(recipe, sizes, fits)
        if not need.stage.startswith(("adapt", "align-head")) and need.gpu(1) > gpu_bytes
    ]


def _stages_memory(recipe: Recipe, sizes: Shapes, fits: list[Fit], found: Rehearsal | None) -> list[dict]:
    """Memory of every stage on each rank."""
    every = list(stage_memory.needs(recipe, sizes, fits))
    if found is None:
        return stage_memory.rows(every, device_for(sizes) is not CPUS)
    then = Recipe.model_validate(found.recipe)
    before = stage_memory.needs(then, sizes, _fits(then, sizes, found.ranks, found.memory))
    measured = stage_memory.Peaks(found.peaks, {need.stage: need for need in before})
    return stage_memory.rows(every, found.gpu, measured)


def _too_full(needed: float, free: float | None) -> list[DcgenError]:
    if free is None or needed <= free:
        return []
    return [
        ResourceError(
            f"the disk is too small, {needed / 1e9:.1f} GB needed and {free / 1e9:.1f} GB free",
            "free space, or say how much the machine that will convert has (plan --disk GB)",
        )
    ]


def fit_phase(recipe: Recipe, source: Identity, phase: Phase, gpus: int = 1, gpu_bytes: float = GPU_BYTES) -> Fit:
    """ZeRO stage, offload and micro-batch for one phase on `gpus` GPUs, with the reason; `.problem` when none fits."""
    return decide(recipe, phase, shapes_of(recipe, source), gpus, gpu_bytes)


def start_bytes(recipe: Recipe, source: Identity) -> float:
    """Bytes of the gradients that are summed at a time to find where the LoRA of the first phase begins."""
    return group_bytes(shapes_of(recipe, source).lora_layers(recipe.adapt.phases[0]))


def require_disk(resolved: Resolved, run_dir: Path, output: Path, until: str | None = None) -> None:
    """Refuse a conversion whose downloads, run folder and bundle would not fit; what the run holds already counts.

    Args:
        until: the last stage that will run; None: all.
    Raises:
        ResourceError: naming the disk, what is needed and what is free.
    """
    sizes = shapes_of(resolved.recipe, resolved.identity)
    recipe = counted(resolved.recipe, resolved.identity)[0]
    kinds = costs.disk(recipe, sizes)["bytes"]
    needed = costs.run_peak(recipe, sizes, until) - _made(Path(run_dir))
    bundle = kinds["bundle"] if until in (None, "bundle", "verify") else 0
    check_disk([(costs.hub_cache(), kinds["downloads"]), (Path(output), bundle), (Path(run_dir), needed)])


def _made(run_dir: Path) -> int:
    """Bytes that a run has written already, with those that `clean` has removed."""
    found = [path.stat() for path in run_dir.rglob("*") if path.is_file()]
    held = sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in found}.values())  # a linked shard counts once
    return held + sum(size for _, size in removed(run_dir))


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


def _grid(grid: Grid) -> dict[str, Any]:
    """f, c and p; of videos the frames of a latent frame, and whether the first one is of the first frame alone."""
    time = {} if grid.time == STILL else {"frames": grid.time.frames, "first_frame_alone": grid.time.alone}
    return {"f": grid.f, "c": grid.c, "p": grid.p, **time}


def _tokens(resolved: Resolved, sizes: Shapes) -> list[dict]:
    """Image tokens before and after the swap at every resolution, and of every bucket where the recipe has any."""
    recipe = resolved.recipe
    rows = []
    for side in sorted({phase.resolution for phase in recipe.adapt.phases}):
        before, after = sizes.drawn(sizes.old, side), sizes.drawn(sizes.new, side)
        row: dict[str, Any] = {"resolution": side, "before": before, "after": after, "ratio": before / after}
        if sizes.family.axes == 3:
            row |= {"frames": sizes.frames, "latent_frames": sizes.times(sizes.new)}
        rows.append(row)
        if recipe.data.buckets:
            found = geometry.bucket_sizes(sizes.family, sizes.source.config, sizes.old, sizes.new, side)
            row["buckets"] = [
                {"height": h, "width": w, "before": sizes.drawn(sizes.old, h, w), "after": sizes.drawn(sizes.new, h, w)}
                for h, w in found
            ]
    return rows


def _notes(fetch: list[dict], resolved: Resolved, sizes: Shapes) -> list[str]:
    """What is experimental, missing or gated; none of it stops a plan."""
    family, count = sizes.family, sizes.references
    notes = [*resolved.told, *([note] if (note := family.note(count)) else [])]
    if count:
        given = "a reference of its size" if count == 1 else f"up to {count} references of its size"
        notes.append(
            f"it edits: each picture comes with {given}. The networks see the tokens of all too, {count + 1} times as "
            "many as the table of tokens says; time, memory and disk are priced with them"
        )
    notes += _seen(resolved.recipe, sizes)
    if not sizes.codec.parameters:
        notes.append(f"the weights of {resolved.recipe.ae} are not here: memory and disk are without them")
    for row in (row for row in fetch if not row["cached"]):
        if row["gated"]:
            notes.append(f"{row['repo']} is gated: accept its licence at {row['accept_at']} and set HF_TOKEN")
        if resolved.machine.offline:
            notes.append(f"offline, and {row['repo']} is not in the cache: fetch it before converting")
    notes += dict.fromkeys(found.told for found in drawable.drawn_beyond(resolved.recipe, resolved.identity))
    if "class_labels" not in family.text_keys:
        every = (resolved.recipe.data_of(number) for number in resolved.recipe.sets)
        drawn = [data for data in every if data.kind == "synthetic"]
        doubts = [_doubt(family, data) for data in drawn]
        notes += dict.fromkeys(doubt for doubt in doubts if doubt)
    return notes


def _paired(recipe: Recipe, sizes: Shapes) -> list[str]:
    """What the base's autoencoder leaves out."""
    count = recipe.data_of(recipe.aligned_set).count
    paired = costs.paired_pictures(recipe, sizes, recipe.aligned_set)
    return [told(paired, count, sizes.family.axes == 3, *sizes.alignment_rows)] if paired < count else []


def _seen(recipe: Recipe, sizes: Shapes) -> list[str]:
    """What follows where the text encoder sees the references, and where the pipeline resizes them."""
    family, notes, last = sizes.family, [], recipe.adapt.phases[-1].resolution
    if family.picture_tokens:
        each = costs.embedding_bytes(recipe, sizes)
        done = "computed in every step" if recipe.latents.text == "encode" else "stored"
        notes.append(
            f"the text encoder of a {family.name} model sees the references: text embeddings are {each / 1e6:.0f} MB "
            f"for each row, and no row shares them. With latents.text {recipe.latents.text} they are {done}"
        )
    if family.reference_side not in (None, last):
        side = family.reference_side
        notes.append(
            f"the stock {family.pipeline_class} gives every reference the area of {side} x {side} px, and the last "
            f"phase, at {last} px, trains with references of its own size: let it end at {side} px"
        )
    return notes


def _doubt(family: Family, data: Data) -> str:
    """Why the prompts of ``data`` will not do to draw from; empty where they may."""
    if not drawable.draws_edits(data, family):
        return prompts.doubt(data.prompts, data.count)
    if data.prompts not in prompts.CAPTIONS:
        return ""
    return (
        f"data.prompts {data.prompts} gives captions, and a {family.name} model edits pictures by instructions: "
        "--prompts FILE and --set data.sources=FOLDER, or pictures that were edited with --data FILE.jsonl"
    )


def _settings(resolved: Resolved) -> dict:
    values = leaves(resolved.recipe.model_dump(mode="json"))
    return {key: {"value": value, "origin": resolved.origins[key]} for key, value in values}
