"""The walk of one conversion, stage by stage. Read this first.

    (import ->) surgery -> data -> latents -> align-embedder -> align-head -> (adapt-1 -> merge-1 -> adapt-2 -> merge-2
    ...)
            -> quantize -> bundle -> verify

import writes a source that is no plain pipeline folder (a single file, LoRAs to fuse) as one. It or surgery comes first
because they read every byte of the inputs: a damaged checkpoint is found before hours of synthesis.

Every stage reads artefacts of the run folder and writes its own; journal.py decides which stages still hold. `inputs`
below lists what a stage depends on: a change there, or in a stage that it builds on, makes it run again. Pictures do
not depend on the autoencoder, so another --ae keeps them. Layout settings (schema.LAYOUT) are left out: a smaller
micro-batch after an out-of-memory error continues the training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dcgen_convert.bundle.layout import check_output
from dcgen_convert.bundle.manifest import FILE as MANIFEST
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object, write_json
from dcgen_convert.core.journal import MARKER, Run, Stage, fingerprint
from dcgen_convert.core.version import __version__
from dcgen_convert.planning.plan import require_disk
from dcgen_convert.ranks import join
from dcgen_convert.ranks.crew import SOLO, Crew
from dcgen_convert.ranks.machine import Machine
from dcgen_convert.recipe.loading import Resolved, revive
from dcgen_convert.recipe.schema import result_settings
from dcgen_convert.stages.imported import run
from dcgen_convert.stages.job import Job, prepare

RECIPE = "recipe.json"
NEW_RUN = "start a new run with another --run-dir"
ASKED = "asked.json"  # the stages that --from asked for and that are still to be done, and the job that asked


@dataclass(frozen=True)
class Step:
    """One stage: its name, the function that does it, what it depends on, and the stages that it builds on.

    ``after`` is None for all stages before it, which is what most build on.
    """

    name: str
    function: Callable[[Job, Stage], None]
    inputs: dict[str, Any]
    after: tuple[str, ...] | None = None


def walk(job: Job, output: Path, force: bool) -> Iterator[Step]:
    """The stages of ``job`` in order."""
    from dcgen_convert.checkpoint import imported
    from dcgen_convert.stages import adapt as train
    from dcgen_convert.stages import align_embedder, align_head, bundle, latents, pictures, surgery
    from dcgen_convert.stages import quantize as svdquant

    recipe = result_settings(job.recipe)
    phases = recipe["adapt"].pop("phases")
    common = {"source": job.source.fingerprint, "dtype": recipe["dtype"], "seed": recipe["seed"]}
    if job.source.imported:
        yield Step(imported.STAGE, run, {"source": job.source.fingerprint})
    yield Step("surgery", surgery.run, {**common, "autoencoder": job.ae.fingerprint, "resolution": job.resolution})
    yield Step("data", pictures.run, {**common, **pictures.inputs(job)}, after=())
    resolutions = sorted({phase["resolution"] for phase in phases})
    shapes = {"buckets": True} if job.recipe.data.buckets else {}
    yield Step("latents", latents.run, {"latents": recipe["latents"], "resolutions": resolutions, **shapes})
    yield Step(
        "align-embedder",
        align_embedder.run,
        {"align_embedder": recipe["align_embedder"], "shift": recipe["adapt"]["shift"]},
    )
    yield Step("align-head", align_head.run, {"align_head": recipe["align_head"], "adapt": recipe["adapt"]})
    for number, phase in enumerate(phases, 1):
        yield Step(f"adapt-{number}", lambda job, stage, n=number: train.adapt_phase(job, stage, n), {"phase": phase})
        yield Step(
            f"merge-{number}",
            lambda job, stage, n=number: train.merge_phase(job, stage, n),
            {"merge_lora": recipe["merge_lora"]},
        )
    if job.recipe.quantize.format != "none":
        yield Step("quantize", svdquant.run, {"quantize": recipe["quantize"], "bundle": recipe["bundle"]})
    yield Step(
        "bundle",
        lambda job, stage: bundle.write(job, stage, output, force),
        {"bundle": recipe["bundle"], "output": str(output), "recipe": recipe},
    )
    yield Step("verify", lambda job, stage: bundle.check(job, stage, output), {"evaluate": recipe["evaluate"]})


def convert(
    resolved: Resolved,
    run_dir: Path,
    output: Path,
    console,
    *,
    crew: Crew = SOLO,
    start: str | None = None,
    until: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Convert; returns the result document (bundle, run folder, stages with seconds and metrics).

    Args:
        crew: the other ranks, which help with the stages that can be shared. They do nothing but what rank 0 asks for.
        start: run this stage and all after it again, even where they hold.
        until: stop after this stage.
        force: replace an output folder that is not empty.
    """
    run = Run(Path(run_dir), console)
    with run.locked():
        recorded = _read_record(run.path / RECIPE) if (run.path / RECIPE).exists() else {}
        job = prepare(resolved, run, console, crew)
        if recorded.get("output") != str(output) or not _bundled(output, run):
            check_output(output, force)
        require_disk(resolved, run.path, output)
        record = {
            "recipe": resolved.recipe.model_dump(mode="json"),
            "machine": asdict(resolved.machine),
            "output": str(output),
        }
        write_json(run.path / RECIPE, {**record, "version": __version__})
        crew.introduce({"run": str(run.path), **record})
        steps = list(walk(job, output, force))
        names = [step.name for step in steps]
        for name in (start, until):
            if name is not None and name not in names:
                raise InputError(f"no stage is called {name!r}", f"the stages are {', '.join(names)}")
        return _run_steps(job, steps, output, until, _asked(run, names, start, until))


def with_inputs(steps: list[Step]) -> Iterator[tuple[Step, dict[str, Any]]]:
    """Every step with all that it depends on: its own inputs, the program, and the stages that it builds on."""
    prints: dict[str, str] = {}
    for step in steps:
        before = prints if step.after is None else {name: prints[name] for name in step.after}
        inputs = {**step.inputs, "version": __version__, "before": fingerprint(before)}
        prints[step.name] = fingerprint(inputs)
        yield step, inputs


def _asked(run: Run, names: list[str], start: str | None, until: str | None) -> list[str]:
    """The stages that must run again although they hold. A job that starts again after a crash asks only once."""
    path, job = run.path / ASKED, os.environ.get(join.JOB)
    found = read_object(path) if path.exists() else {"job": None, "stages": []}
    if start is None or (job and found["job"] == job):
        return found["stages"]
    last = names.index(until) if until else len(names)
    write_json(path, {"job": job, "stages": names[names.index(start) : last + 1]})
    return names[names.index(start) : last + 1]


def _answered(run: Run, name: str) -> None:
    """Stage ``name`` has run again."""
    path = run.path / ASKED
    if path.exists() and name in (found := read_object(path))["stages"]:
        write_json(path, {**found, "stages": [stage for stage in found["stages"] if stage != name]})


def _run_steps(job: Job, steps: list[Step], output: Path, until: str | None, asked: list[str]) -> dict[str, Any]:
    records = []
    again = False
    for step, inputs in with_inputs(steps):
        lost = step.name == "bundle" and not (output / MANIFEST).exists()
        again = again or lost
        record = None if again or step.name in asked else job.run.done(step.name, inputs)
        if record is None:
            with job.run.stage(step.name, inputs) as stage:
                step.function(job, stage)
            record = job.run.done(step.name, inputs)
            _answered(job.run, step.name)
        else:
            job.console.say(f"{step.name}: holds, skipped")
        job.console.event("stage", name=step.name, seconds=record["seconds"], metrics=record["metrics"])
        records.append({"name": step.name, "seconds": record["seconds"], "metrics": record["metrics"]})
        if step.name == until:
            return {"status": "stopped", "run": str(job.run.path), "stages": records}
    metrics = {
        key: value for record in records for key, value in record["metrics"].items() if record["name"] == "verify"
    }
    return {"status": "done", "bundle": str(output), "run": str(job.run.path), "stages": records, "metrics": metrics}


def _bundled(output: Path, run: Run) -> bool:
    """Whether ``output`` holds the bundle that this very run wrote."""
    return (run.path / "bundle" / MARKER).exists() and (output / MANIFEST).exists()


def recorded(run_dir: Path) -> tuple[Resolved, Path]:
    """What the run in ``run_dir`` was started with, and its output folder.

    Raises:
        InputError: no run folder, a damaged recipe.json, or a run of another version (0.1 and 0.2 are two, 0.2.0 and
            0.2.1 are not): its stages would all run again.
    """
    path = run_dir / RECIPE
    if not path.is_file():
        raise InputError(f"{run_dir} is not a run folder: it has no {RECIPE}", "give the folder that --run-dir named")
    record = _read_record(path)
    recipe, machine, output = (record.get(key) for key in ("recipe", "machine", "output"))
    known = {field.name for field in fields(Machine)}
    if not isinstance(recipe, dict) or not isinstance(machine, dict) or not isinstance(output, str):
        raise InputError(f"{path} is not what a run writes: recipe, machine or output is missing", NEW_RUN)
    if strange := sorted(machine.keys() - known):
        raise InputError(f"{path} has the unknown machine setting {strange[0]!r}", NEW_RUN)
    return Resolved(revive(recipe, str(path)), {}, Machine(**machine)), Path(output)


def _read_record(path: Path) -> dict[str, Any]:
    """A run's recipe.json; InputError when it is damaged or of another version."""
    record = read_object(path)
    theirs = str(record.get("version"))
    if theirs.split(".")[:2] != __version__.split(".")[:2]:
        raise InputError(
            f"{path.parent} is a run of dcgen-convert {theirs}, and this is {__version__}, which cannot go on with it",
            f"go on with it in version {theirs}, or {NEW_RUN}",
        )
    return record
