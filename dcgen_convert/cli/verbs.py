"""The verbs that need more than one call: convert, plan, quantize; and how result documents are rendered."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from dcgen_convert.cli.options import default_name, job_options, output_options, resolve
from dcgen_convert.cli.session import Session
from dcgen_convert.core.console import Console, wants_live
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import Run
from dcgen_convert.core.progress import duration
from dcgen_convert.ranks import join
from dcgen_convert.ranks.crew import Crew
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.settings import leaves

ASK_ABOVE_HOURS = 1.0


def convert(session: Session, source: str, values: dict) -> int:
    """Resolve, (ask), convert, (push)."""
    if values.pop("dry_run"):
        for name in ("output", "run_dir", "start", "until", "force", "push_to", "private", "yes"):
            values.pop(name)
        return plan(session, source, values, 79.1)
    shown = output_options(values)
    resolved = resolve(source, values)
    name = default_name(resolved)
    output = Path(values["output"] or name).absolute()
    run_dir = Path(values["run_dir"] or Path("runs") / name).absolute()
    console = session.begin(**shown, run_dir=run_dir)
    if not values["yes"] and join.world() == 1:
        _ask(resolved, console)

    def work(crew: Crew) -> dict:
        from dcgen_convert import conversion

        steps = {"start": values["start"], "until": values["until"], "force": values["force"]}
        doc = conversion.convert(resolved, run_dir, output, console, crew=crew, **steps)
        if values["push_to"] and doc.get("bundle"):
            from dcgen_convert.bundle.push import push

            doc = {**doc, "url": push(Path(doc["bundle"]), values["push_to"], values["private"], console)}
        return doc

    return _on_ranks(session, resolved, run_dir, work)


def resume(session: Session, run_dir: Path, values: dict) -> int:
    """Continue a run, with the ranks of its record unless the options name others."""
    asked, watched = {"gpus": values.pop("gpus"), "hostfile": values.pop("hostfile")}, job_options(values)
    console = session.begin(**output_options(values), run_dir=run_dir)
    from dcgen_convert import conversion

    resolved, output = conversion.recorded(run_dir)
    if any(asked.values()):
        resolved = replace(resolved, machine=replace(resolved.machine, **asked))
    elif join.world() > 1 and join.LAUNCHED not in os.environ:  # what torchrun or srun started counts, not the record
        resolved = replace(resolved, machine=replace(resolved.machine, gpus=None, hostfile=None))
    resolved = replace(resolved, machine=replace(resolved.machine, **watched))
    return _on_ranks(
        session, resolved, run_dir, lambda crew: conversion.convert(resolved, run_dir, output, console, crew=crew)
    )


def _on_ranks(session: Session, resolved: Resolved, run_dir: Path, work: Callable[[Crew], dict]) -> int:
    """Start the ranks and wait for them; or, as one of them (or alone), do the work."""
    from dcgen_convert.core import track
    from dcgen_convert.ranks import hosts, launch

    console, machine = session.console, resolved.machine
    track.require(machine.track)
    if launch.wanted(machine):
        Run(run_dir, console)
        if machine.hostfile:
            return hosts.run(session.argv, machine, run_dir, console, session.result)
        return launch.run(session.argv, machine.gpus, run_dir, console, session.result)
    crew = session.join(hostfile=bool(machine.hostfile), timeout=machine.rank_timeout)
    if crew.rank:
        from dcgen_convert.stages import tasks

        return crew.serve(tasks.Performer(crew, console))
    with track.tracking(console, machine.track, run_dir, dict(leaves(resolved.recipe.model_dump(mode="json")))):
        return finish(console, work(crew))


def plan(session: Session, source: str, values: dict, gpu_memory: float) -> int:
    """Resolve and plan. Exit 4 when no micro-batch of one picture fits."""
    console = session.begin(**output_options(values))
    resolved = resolve(source, values)
    from dcgen_convert.planning import plan as planning

    doc = planning.plan(resolved, gpu_bytes=gpu_memory * 2**30)
    console.result(doc, planning.render(doc))
    return 0 if doc["status"] == "feasible" else 4


def quantize(session: Session, source: str, values: dict) -> int:
    """SVDQuant of a checkpoint as it is."""
    shown = output_options(values)
    from dcgen_convert.recipe.schema import Calibration, Quantize
    from dcgen_convert.recipe.sources import short_name

    count = values["calibration"]
    section = Quantize(
        format=values["quant_format"],
        rank=values["rank"],
        container=values["container"],
        dense=values["dense"],
        fuse_qkv=values["fuse_qkv"],
        calibration=Calibration(prompts=count or 1),
    )
    output = Path(values["output"] or f"{short_name(source)}-{section.format}").absolute()
    console = session.begin(**shown)
    from dcgen_convert.quantization import Drawing, quantize_source

    inputs = {"base": values["base"], "loras": values["loras"]}
    drawn = ("prompts", "resolution", "steps", "guidance", "seed")
    drawing = Drawing(data_free=count is None, **{key: values[key] for key in drawn})
    return finish(console, quantize_source(source, output, section, drawing, console, **inputs))


def finish(console: Console, doc: dict) -> int:
    """Show the result of a conversion: the bundle's path, or the run folder when it stopped before the bundle."""
    doc = {"schema": "dcgen.result/1", "status": "done", **doc}
    console.result(doc, str(doc.get("bundle") or doc.get("run") or doc.get("run_dir") or ""))
    return 0


def verdict(console: Console, doc: dict, bundle: str) -> int:
    """Show what verify found; exit 1 when it found a difference (`ok` false, or a status that says so)."""
    doc = {"schema": "dcgen.result/1", "status": "done", **doc}
    failed = doc.get("ok") is False or doc["status"] in ("failed", "different")
    console.result(doc, bundle if not failed else f"{bundle}: differs")
    return 1 if failed else 0


def _ask(resolved: object, console: Console) -> None:
    """Say the cost first; on a terminal, let the user stop before hours are spent."""
    from dcgen_convert.planning import plan as planning

    time = planning.plan(resolved)["time"]
    console.say(f"expected: {duration(time['gpu_hours'] * 3600)} on {time['device']} [{time['basis']}]")
    ask = time["gpu_hours"] > ASK_ABOVE_HOURS and wants_live(console.stderr, {})
    if ask and not click.confirm("Go on?", default=True, err=True):
        raise InputError("not started", "add -y to skip the question")
