"""The walk of one conversion, stage by stage. Read this first.

    (import ->) surgery -> data -> latents -> align-embedder -> align-head
            -> adapt-1 -> merge-1 (-> adapt-2 -> merge-2 ...) (-> quantize) -> bundle -> verify

A model with several networks, each for a part of the noise levels, has surgery, both alignments, adapt-n and merge-n
for each network: surgery-high, surgery-low and so on. One network is trained at a time, all on the same latents.

A phase with data of its own (phase n) has stages data-n and latents-n, made before any training begins. Data that no
phase is trained on are not made.

Some sources are no plain pipeline folder: a single file, or a source with LoRAs to fuse. Stage import writes such a
source as a pipeline folder. Import and surgery read every byte of the inputs. They come first, so that a damaged
checkpoint is found before hours of synthesis.

Each stage reads files of the run folder and writes its own folder there. core/journal.py decides whether the result of
a stage still holds. `walk` says which stages it builds on; stages/depends.py says which settings it depends on, and
with which changes it goes on instead of starting again. Pictures do not depend on the autoencoder, so a run keeps them
when --ae changes. More than ten minutes of work are never deleted unless the user said so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dcgen_convert.bundle.manifest import FILE as MANIFEST
from dcgen_convert.core import clock
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import write_json
from dcgen_convert.core.journal import Found, Run, Stage
from dcgen_convert.core.names import EXPORT, MODULES, OPEN, RECIPE
from dcgen_convert.core.progress import duration
from dcgen_convert.families import Expert
from dcgen_convert.networks.models import TRANSFORMER
from dcgen_convert.planning import licences, needs
from dcgen_convert.planning.impossible import require_possible
from dcgen_convert.planning.needs import Part
from dcgen_convert.planning.plan import require_disk, require_fits
from dcgen_convert.ranks import join
from dcgen_convert.ranks.crew import SOLO, Crew
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.stages import folders, memory, pictures, records
from dcgen_convert.stages.clean import retain
from dcgen_convert.stages.job import Job, prepare
from dcgen_convert.stages.records import recorded as recorded
from dcgen_convert.stages.steps import Step, Survey, cleaned_for, wanted


def walk(job: Job, output: Path, force: bool) -> Iterator[Step]:
    """The stages of ``job`` in order."""
    from dcgen_convert.stages import bundle, depends, imported, quantize, surgery

    inputs, weights = partial(depends.inputs, job), (f"{TRANSFORMER}/*",)
    if job.source.imported:
        yield Step(depends.IMPORT, imported.run, inputs(depends.IMPORT), repair="all")
    for own in job.experts:
        yield _of_network(own, folders.SURGERY, surgery.run, result=weights, recorded=_recorded(own, folders.SURGERY))
    first = folders.latents_stage(job.recipe.aligned_set)
    for number in job.recipe.sets:
        yield from _of_pictures(job.of_set(number), first)
    yield from _aligned(job, first)
    for number in range(1, len(job.recipe.adapt.phases) + 1):
        yield from _phase(job, number)
    converted = [own.expert.of(folders.merge_stage(len(job.recipe.adapt.phases))) for own in job.experts]
    if job.recipe.quantize.format != "none":
        result = (*weights, quantize.SINGLE_FILE)
        yield Step(folders.QUANTIZE, quantize.run, inputs(folders.QUANTIZE), tuple(converted), result)
        converted = [folders.QUANTIZE]
    parts = (*converted, *([first] if job.recipe.latents.normalise == "channel" else []))
    told = {**inputs(folders.BUNDLE), "output": str(output)}
    yield Step(folders.BUNDLE, partial(bundle.write, output=output, force=force), told, parts)
    drawn = {"evaluate": job.recipe.evaluate.model_dump(mode="json")}
    yield Step(folders.VERIFY, partial(bundle.check, output=output), drawn, (folders.BUNDLE,))


def _aligned(job: Job, first: str) -> Iterator[Step]:
    """Both alignments of every network, on the latents that stage ``first`` encodes."""
    from dcgen_convert.stages import align_embedder, align_head

    embedder, head = folders.ALIGN_EMBEDDER, folders.ALIGN_HEAD
    for own in job.experts:
        dense = own.expert.of(folders.SURGERY)
        known = _recorded(own, embedder)
        yield _of_network(own, embedder, align_embedder.run, (dense, first), result=(MODULES,), recorded=known)
    for own in job.experts:
        before = (own.expert.of(folders.SURGERY), first, own.expert.of(embedder))
        yield _of_network(own, head, align_head.run, before, result=(MODULES,), continues=_training(own, head))


def _phase(job: Job, number: int) -> Iterator[Step]:
    """Phase ``number`` of every network, and then its merge."""
    from dcgen_convert.stages import adapt

    name, merged = folders.adapt_stage(number), folders.merge_stage(number)
    dense = folders.SURGERY if number == 1 else folders.merge_stage(number - 1)
    rows = folders.latents_stage(job.recipe.set_of(number))
    for own in job.experts:
        before = (rows, own.expert.of(dense), *([own.expert.of(folders.ALIGN_HEAD)] if number == 1 else []))
        work, goes_on = partial(adapt.adapt_phase, number=number), _training(own, name)
        yield _of_network(own, name, work, before, number, result=(f"{EXPORT}/*",), continues=goes_on)
    for own in job.experts:
        before = (own.expert.of(dense), own.expert.of(name))
        yield _of_network(own, merged, partial(adapt.merge_phase, number=number), before, number)


def _of_network(
    own: Job, stage: str, function: Callable[[Job, Stage], None], before: tuple[str, ...] = (), number: int = 0,
    **more: Any,
) -> Step:  # fmt: skip
    """A stage that every network of the model has; ``number``: of its phase."""
    from dcgen_convert.stages import depends

    return Step(
        own.expert.of(stage), lambda _, folder: function(own, folder), depends.inputs(own, stage, number), before,
        **more,
    )  # fmt: skip


def _training(own: Job, stage: str) -> Callable[[dict[str, Any], dict[str, Any]], str | None]:
    from dcgen_convert.stages import depends

    return lambda old, new: depends.training_continues(own, stage, old, new)


def _recorded(own: Job, stage: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    from dcgen_convert.stages import depends

    return lambda old: depends.recorded(own, stage, old)


def _of_pictures(job: Job, first: str) -> Iterator[Step]:
    """The two stages of the pictures of ``job``; stage ``first`` rewrites the autoencoder where channels are
    normalised.
    """
    from dcgen_convert.stages import depends, latents

    data, name = folders.data_stage(job.pictures), folders.latents_stage(job.pictures)
    rewritten = job.recipe.latents.normalise == "channel" and name != first
    yield Step(
        data, lambda _, stage: pictures.run(job, stage), depends.inputs(job, data), repair="file", extends=True,
        continues=lambda old, _: depends.data_continues(job, old),
    )  # fmt: skip
    yield Step(
        name, lambda _, stage: latents.run(job, stage), depends.inputs(job, name),
        (data, *([first] if rewritten else [])), ("*.safetensors", "*.json", "*.jsonl"),
        repair="file", extends=True, continues=lambda old, new: depends.latents_continue(job, old, new),
        recorded=lambda old: depends.recorded(job, name, old),
    )  # fmt: skip


def convert(  # noqa: PLR0913  every option of the verb by its name
    resolved: Resolved,
    run_dir: Path,
    output: Path,
    console: Console,
    *,
    crew: Crew = SOLO,
    start: str | None = None,
    until: str | None = None,
    force: bool = False,
    consent: Callable[[str], bool] = lambda _: False,
) -> dict[str, Any]:
    """Convert; returns the result document (bundle, run folder, stages with seconds and metrics).

    Args:
        crew: the other ranks. They help with the stages that can be shared, and do only what rank 0 asks for.
        start: run this stage and all stages after it again, even those whose results hold.
        until: stop after this stage.
        force: replace an output folder that is not empty.
        consent: is asked before more than ten minutes of work are deleted.
    """
    run = Run(Path(run_dir), console, resolved.machine.check)
    with run.locked():
        before = records.read(run.path / RECIPE) if (run.path / RECIPE).exists() else {}
        job = prepare(resolved, run, console, crew)
        experts = job.source.experts
        stages = needs.stages(job.recipe, job.source.imported, experts)
        if start is not None:
            start = _stage(start, stages, experts)[0]
        if until is not None:
            until = _stage(until, stages, experts)[-1]
        if start is not None and until is not None and stages.index(start) > stages.index(until):
            raise InputError(f"stage {start} comes after {until}, where the run is to stop", "leave out --until")
        for line in licences.lines(licences.licences(resolved)):
            console.say(line)
        for line in (*resolved.told, *resolved.derivation):
            console.say(line)
        console.say(job.alignment.told)
        pictures.require_all(job)
        _require_measures(job, until)
        require_possible(resolved.recipe, resolved.identity)
        require_disk(resolved, run.path, output, until)
        record = {
            "recipe": resolved.recipe.model_dump(mode="json"),
            "machine": asdict(resolved.machine),
            "output": str(output),
            **({"experts": [one.name for one in experts]} if len(experts) > 1 else {}),
        }
        sizes = {name: path.stat().st_size for name, path in job.source.content_files.items()}
        if not resolved.machine.check:
            job.source.known.update(records.believed(sizes, before.get("source") or {}))
        total = sum(sizes.values())
        with console.progress("hash the source", total, "B") as bar, clock.timed("hash the source", total):
            contents = job.source.contents(bar.advance)
        record["source"] = {name: [sizes.get(name), digest] for name, digest in contents.items()}
        force = force or before.get("replace") == str(output)
        every = steps = list(walk(job, output, force))
        if until is not None:
            steps = steps[: stages.index(until) + 1]
        asked = records.asked(run, [step.name for step in steps], start)
        parts = needs.parts(resolved.recipe, job.source.imported, experts)
        lost = [step.name for step in steps if _bundle_is_gone(step, output)]
        survey = Survey(run, steps, asked, lost, parts)
        survey.require_output(output, force)
        survey.require_consent(consent)
        _require_memory(job, survey)
        asked = [*survey.again, *asked]
        replaced = str(output) if force and folders.BUNDLE in survey.open else None
        records.write(run, {**record, "replace": replaced})
        still = {*asked, *survey.open}
        if until is not None:  # what stands behind it may be outdated too; its sizes tell enough
            still |= Survey(Run(run.path, NULL, False), every, asked).open
        write_json(run.path / OPEN, {"stages": [name for name in stages if name in still]})
        if asked:
            write_json(run.path / records.ASKED, {"job": os.environ.get(join.JOB), "stages": asked})
        crew.introduce({"run": str(run.path), **record})
        return _run_steps(job, steps, output, asked, parts)


def _stage(name: str, stages: list[str], experts: Sequence[Expert]) -> list[str]:
    """The stages that the user means with ``name``: one of ``stages``, or the one of every network."""
    found = [stage for stage in stages if stage == name] or [one.of(name) for one in experts]
    if not set(found) <= set(stages):
        raise InputError(f"no stage is called {name!r}", f"the stages are {', '.join(stages)}")
    return found


def _require_measures(job: Job, until: str | None) -> None:
    """Refuse measures of `evaluate.metrics` and `watch.metrics` that cannot run, as far as the walk goes."""
    if job.recipe.evaluate.metrics == "tiny-world" and until in (None, folders.VERIFY):
        from dcgen_convert.stages import compare

        compare.require(job)
    if job.recipe.evaluate.measures:
        from dcgen_convert.stages import compare, judged

        judged.require(job, job.recipe.seed + compare.SEED)
    if job.recipe.watch.measures:
        from dcgen_convert.stages import watched

        watched.require(job)


def _require_memory(job: Job, survey: Survey) -> None:
    """ResourceError when a training that is still to be done does not fit, days before it is reached."""
    from dcgen_convert.stages.layout import memory_per_rank

    phases = range(1, len(job.recipe.adapt.phases) + 1)
    trained = [folders.ALIGN_HEAD, *map(folders.adapt_stage, phases)]
    if survey.open & {own.expert.of(stage) for stage in trained for own in job.experts}:
        require_fits(job.recipe, job.identity, job.crew.world, memory_per_rank(job.crew.world))


def _bundle_is_gone(step: Step, output: Path) -> bool:
    """Whether the step writes the bundle, and what it wrote is not there."""
    return step.name == folders.BUNDLE and not (output / MANIFEST).exists()


def _run_steps(job: Job, steps: list[Step], output: Path, asked: list[str], parts: list[Part]) -> dict[str, Any]:
    done: list[dict[str, Any]] = []
    known: dict[str, Found] = {}
    for step in steps:
        made_from = wanted(step, known)
        found = job.run.look(made_from)
        again = _bundle_is_gone(step, output) or step.name in asked
        if again or found.state != "holds":
            if gone := cleaned_for(step.name, known, parts):  # a stage before it came out different
                what = f"{step.name} must run again, and clean has removed the files of {gone[0]} that it reads"
                raise InputError(what, f"add --from {gone[0]} to make them again")
            _tell(job.console, step.name, found, again)
            with memory.named(step.name), job.run.stage(made_from, found, again) as stage, memory.watched(stage):
                records.answered(job.run, step.name)  # now: when it is cut off, it continues
                step.function(job, stage)
            found = job.run.look(made_from)
            assert found.state == "holds", f"stage {step.name} left no marker"
        else:
            cleaned = "; clean has removed files of it" if found.cleaned else ""
            job.console.say(f"{step.name}: holds, skipped{cleaned}{_of_fewer(step, known)}")
        known[step.name] = found
        records.passed(job.run, step.name)
        retain(job.run, job.recipe, parts, [*known], job.console)
        record = found.record
        row = {"seconds": record["seconds"], "metrics": record["metrics"], "peak": record.get("peak", {})}
        job.console.event("stage", name=step.name, **row)
        done.append({"name": step.name, **row})
    if steps[-1].name != folders.VERIFY:
        return {"status": "stopped", "run": str(job.run.path), "stages": done}
    verified = done[-1]["metrics"]
    return {"status": "done", "bundle": str(output), "run": str(job.run.path), "stages": done, "metrics": verified}


def _of_fewer(step: Step, known: dict[str, Found]) -> str:
    """A word on a result that is older than the newest of what it was made from."""
    grown = [name for name in step.after if known[name].origin != known[name].result]
    return f"; {grown[0]} has grown since, --from {step.name} makes it anew" if grown and not step.extends else ""


def _tell(console: Console, name: str, found: Found, again: bool) -> None:
    """Say why a stage runs."""
    if found.cleaned and again:
        console.say(f"{name}: runs again, clean has removed files of it that are needed now")
    if again or found.state == "nothing":
        return
    words = {
        "interrupted": "continues where it stopped",
        "continues": f"continues, {found.reason}",
        "damaged": f"runs again, {found.reason}",
        "outdated": f"starts again, {found.reason}; {duration(found.seconds)} of work are deleted",
    }
    say = console.warn if found.state == "outdated" else console.say
    say(f"{name}: {words[found.state]}")
