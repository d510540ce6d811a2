"""The walk of one conversion, stage by stage. Read this first.

    (import ->) surgery -> data -> latents -> align-embedder -> align-head
            -> adapt-1 -> merge-1 (-> adapt-2 -> merge-2 ...) (-> quantize) -> bundle -> verify

Some sources are no plain pipeline folder: a single file, or a source with LoRAs to fuse. Stage import writes such a
source as a pipeline folder. Import and surgery read every byte of the inputs. They come first, so that a damaged
checkpoint is found before hours of synthesis.

Each stage reads files of the run folder and writes its own folder there. core/journal.py decides whether the result of
a stage still holds. The dictionaries below list what a stage depends on: when one of these values changes, or an
earlier stage that it builds on, the stage runs again. Pictures do not depend on the autoencoder, so a run keeps them
when --ae changes. The layout settings (LAYOUT in recipe/schema.py) are left out: after an out-of-memory error the
training continues with a smaller micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dcgen_convert.bundle.layout import check_output
from dcgen_convert.bundle.manifest import FILE as MANIFEST
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_object, understood, write_json
from dcgen_convert.core.journal import MARKER, Run, Stage, fingerprint
from dcgen_convert.core.names import RECIPE
from dcgen_convert.core.version import __version__
from dcgen_convert.planning.plan import require_disk
from dcgen_convert.ranks import join
from dcgen_convert.ranks.crew import SOLO, Crew
from dcgen_convert.ranks.machine import Machine
from dcgen_convert.recipe.loading import Resolved, revive
from dcgen_convert.recipe.schema import result_settings
from dcgen_convert.stages import folders, pictures
from dcgen_convert.stages.job import Job, prepare

NEW_RUN = "start a new run with another --run-dir"
ASKED = "asked.json"  # the stages that --from asked for and that are still to be done, and the job that asked


@dataclass(frozen=True)
class Step:
    """One stage of the walk.

    Attributes:
        name: of the stage, and of its folder in the run.
        function: does the work.
        inputs: what the result depends on, besides the stages before it.
        after: the stages that it builds on; None: all stages before it.
    """

    name: str
    function: Callable[[Job, Stage], None]
    inputs: dict[str, Any]
    after: tuple[str, ...] | None = None


def walk(job: Job, output: Path, force: bool) -> Iterator[Step]:
    """The stages of ``job`` in order."""
    from dcgen_convert.checkpoint.imported import STAGE as IMPORT
    from dcgen_convert.stages import (
        adapt,
        align_embedder,
        align_head,
        bundle,
        imported,
        latents,
        quantize,
        surgery,
    )

    recipe = result_settings(job.recipe)
    phases = recipe["adapt"].pop("phases")
    common = {"source": job.source.contents(), "dtype": recipe["dtype"], "seed": recipe["seed"]}
    if job.source.imported:
        yield Step(IMPORT, imported.run, {"source": job.source.contents()})
    geometry = {"autoencoder": job.ae.fingerprint, "resolution": job.resolution}
    yield Step(folders.SURGERY, surgery.run, {**common, **geometry})
    yield Step(folders.DATA, pictures.run, {**common, **pictures.inputs(job)}, after=())
    resolutions = sorted({phase["resolution"] for phase in phases})
    shapes = {"buckets": True} if job.recipe.data.buckets else {}
    yield Step(folders.LATENTS, latents.run, {"latents": recipe["latents"], "resolutions": resolutions, **shapes})
    embedder = {"align_embedder": recipe["align_embedder"], "shift": recipe["adapt"]["shift"]}
    yield Step(folders.ALIGN_EMBEDDER, align_embedder.run, embedder)
    head = {"align_head": recipe["align_head"], "adapt": recipe["adapt"]}
    yield Step(folders.ALIGN_HEAD, align_head.run, head)
    for number, phase in enumerate(phases, 1):
        yield Step(folders.adapt_stage(number), partial(adapt.adapt_phase, number=number), {"phase": phase})
        merging = {"merge_lora": recipe["merge_lora"]}
        yield Step(folders.merge_stage(number), partial(adapt.merge_phase, number=number), merging)
    if job.recipe.quantize.format != "none":
        quantising = {"quantize": recipe["quantize"], "bundle": recipe["bundle"]}
        yield Step(folders.QUANTIZE, quantize.run, quantising)
    told = {"bundle": recipe["bundle"], "output": str(output), "recipe": recipe}
    yield Step(folders.BUNDLE, partial(bundle.write, output=output, force=force), told)
    yield Step(folders.VERIFY, partial(bundle.check, output=output), {"evaluate": recipe["evaluate"]})


def convert(
    resolved: Resolved,
    run_dir: Path,
    output: Path,
    console: Console,
    *,
    crew: Crew = SOLO,
    start: str | None = None,
    until: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Convert; returns the result document (bundle, run folder, stages with seconds and metrics).

    Args:
        crew: the other ranks. They help with the stages that can be shared, and do only what rank 0 asks for.
        start: run this stage and all stages after it again, even those whose results hold.
        until: stop after this stage.
        force: replace an output folder that is not empty.
    """
    run = Run(Path(run_dir), console)
    with run.locked():
        recorded = _read_record(run.path / RECIPE) if (run.path / RECIPE).exists() else {}
        job = prepare(resolved, run, console, crew)
        pictures.require(job)
        if recorded.get("output") != str(output) or not _bundled(output, run):
            check_output(output, force)
        require_disk(resolved, run.path, output, until)
        record = {
            "recipe": resolved.recipe.model_dump(mode="json"),
            "machine": asdict(resolved.machine),
            "output": str(output),
        }
        write_json(run.path / RECIPE, {**record, "version": __version__})
        with console.progress("hash the source", job.source.size, "B") as bar:
            contents = job.source.contents(bar.advance)
        crew.introduce({"run": str(run.path), **record, "contents": contents})
        steps = list(walk(job, output, force))
        names = [step.name for step in steps]
        for name in (start, until):
            if name is not None and name not in names:
                raise InputError(f"no stage is called {name!r}", f"the stages are {', '.join(names)}")
        return _run_steps(job, steps, output, until, _asked(run, names, start, until))


def with_inputs(steps: list[Step]) -> Iterator[tuple[Step, dict[str, Any]]]:
    """Every step with all that it depends on: its own inputs, the version, and the stages that it builds on."""
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
    records: list[dict[str, Any]] = []
    again = False
    for step, inputs in with_inputs(steps):
        lost = step.name == folders.BUNDLE and not (output / MANIFEST).exists()
        again = again or lost
        record = None if again or step.name in asked else job.run.done(step.name, inputs)
        if record is None:
            with job.run.stage(step.name, inputs) as stage:
                step.function(job, stage)
            record = job.run.done(step.name, inputs)
            assert record is not None, f"stage {step.name} left no marker"
            _answered(job.run, step.name)
        else:
            job.console.say(f"{step.name}: holds, skipped")
        job.console.event("stage", name=step.name, seconds=record["seconds"], metrics=record["metrics"])
        records.append({"name": step.name, "seconds": record["seconds"], "metrics": record["metrics"]})
        if step.name == until:
            return {"status": "stopped", "run": str(job.run.path), "stages": records}
    verified = records[-1]["metrics"]
    return {"status": "done", "bundle": str(output), "run": str(job.run.path), "stages": records, "metrics": verified}


def _bundled(output: Path, run: Run) -> bool:
    """Whether ``output`` holds the bundle that this very run wrote."""
    return (run.path / folders.BUNDLE / MARKER).exists() and (output / MANIFEST).exists()


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
    with understood(path, NEW_RUN):
        return Resolved(revive(recipe, str(path)), {}, TypeAdapter(Machine).validate_python(machine)), Path(output)


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
