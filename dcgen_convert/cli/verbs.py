"""The verbs that need more than one call: convert, resume, quantize, adopt; and how results are shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dcgen_convert.api import calls, rehearsing
from dcgen_convert.api.order import Order, order
from dcgen_convert.api.results import Adopted, Conversion, Quantised, Rehearsed, Runs
from dcgen_convert.cli.options import job_options, output_options, recipe_options
from dcgen_convert.cli.session import Session
from dcgen_convert.core.console import Console, wants_live
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import Run
from dcgen_convert.core.progress import duration
from dcgen_convert.core.track import require
from dcgen_convert.ranks import join
from dcgen_convert.ranks.crew import Crew, Member
from dcgen_convert.ranks.machine import Machine

if TYPE_CHECKING:
    from dcgen_convert.judging.order import Asked

ASK_ABOVE_HOURS = 1.0


def convert(session: Session, source: str, values: dict[str, Any]) -> int:
    """Resolve, (ask), convert, (push)."""
    if values.pop("dry_run"):
        return plan(session, source, values)
    _require_push(values["push_to"], values["private"])
    shown = output_options(values)
    job = order(source, recipe_options(values), values["output"], values["run_dir"])
    console = session.begin(**shown, run_dir=job.run_dir)
    if not values["yes"] and "RANK" not in os.environ and join.NODE not in os.environ:
        _ask(job, console)

    def work(crew: Crew) -> Conversion:
        steps = {name: values[name] for name in ("start", "until", "force")}
        done = calls.carry_out(job, console, crew, **steps, consent=lambda lost: _consents(lost, console))
        if values["push_to"] and done.bundle:
            from dcgen_convert.bundle.push import push

            done = replace(done, url=push(done.bundle, values["push_to"], values["private"], console))
        return done

    return _on_ranks(session, job, work)


def resume(session: Session, run_dir: Path, values: dict[str, Any]) -> int:
    """Continue a run, with the ranks of its record unless the options name others."""
    asked, watched = {"gpus": values.pop("gpus"), "hostfile": values.pop("hostfile")}, job_options(values)
    steps = {name: values.pop(name) for name in ("start", "until", "force")}
    job = calls.recorded(run_dir)  # before the log: nothing is written into a folder that is no run folder
    console = session.begin(**output_options(values), run_dir=run_dir)
    if any(asked.values()):
        job = job.on(**asked)
    elif "RANK" in os.environ and join.LAUNCHED not in os.environ:  # torchrun or srun started the ranks
        job = job.on(gpus=None, hostfile=None, restarts=0)
    job = job.on(**watched)

    def work(crew: Crew) -> Conversion:
        return calls.carry_out(job, console, crew, **steps, consent=lambda lost: _consents(lost, console))

    return _on_ranks(session, job, work)


def _on_ranks(session: Session, job: Order, work: Callable[[Crew], Conversion | Rehearsed]) -> int:
    """Start the ranks and wait for them; or, as one of them (or alone), do the work."""
    from dcgen_convert.ranks import launch

    console, machine, run_dir = session.console, job.resolved.machine, job.run_dir
    require(machine.track)
    if launch.wanted(machine):
        from dcgen_convert.stages.possible import require_even

        Run(run_dir, console)
        assert session.result is not None  # `begin` was called
        shared = partial(require_even, job.resolved.recipe, run_dir)
        return launch.run(session.argv, machine, run_dir, console, session.result, shared)
    crew = session.join(machine.rank_timeout)
    if isinstance(crew, Member):
        from dcgen_convert.stages import tasks

        return crew.serve(tasks.Performer(crew, console))
    return finish(console, work(crew))


def rehearse(session: Session, source: str, values: dict[str, Any]) -> int:
    """Every stage at full size on a few pictures; what it measured stands in rehearsal.json."""
    shown = output_options(values)
    job = rehearsing.order(source, recipe_options(values), values["run_dir"], values["random"])
    console = session.begin(**shown, run_dir=job.run_dir)
    sizes = {name: values[name] for name in ("random", "pictures", "steps")}
    return _on_ranks(session, job, lambda crew: rehearsing.carry_out(job, console, crew, **sizes))


def plan(session: Session, source: str, values: dict[str, Any]) -> int:
    """What a conversion will cost. Exit 4 when memory or disk is too small, 2 when it cannot be at all."""
    console = session.begin(**output_options(values))
    from dcgen_convert.planning.text import render

    about: dict[str, Any] = {name: values.get(name) for name in ("gpu_memory", "disk", "measured")}
    found = calls.plan(source, **about, **recipe_options(values))
    document = found.document()
    console.result(document, render(document))
    return found.exit_code


def quantize(session: Session, source: str, values: dict[str, Any]) -> int:
    """SVDQuant of a checkpoint as it is."""
    console = session.begin(**output_options(values))
    return finish(console, calls.quantize(source, **values, console=console))


def adopt(session: Session, source: str, values: dict[str, Any]) -> int:
    """A folder of the DC-Gen authors as a bundle."""
    console = session.begin(**output_options(values))
    return finish(console, calls.adopt(source, **values, console=console))


def evaluate(session: Session, bundle: str, values: dict[str, Any]) -> int:
    """Draw, measure and compare, on the ranks that the options or a launcher name."""
    from dcgen_convert.api import evaluating

    shown, out = output_options(values), values["out"]
    if values["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported
    folder = evaluating.output_of(Path(bundle), None if out is None else Path(out))
    if shown["log_file"] is None or session.rank:
        shown["log_file"] = str(folder / join.log_name(session.rank))
    request = evaluating.request_of({**values, "bundle": bundle})
    console = session.begin(**shown)
    return _evaluate_on_ranks(session, console, request, Machine(gpus=values["gpus"]))


def _evaluate_on_ranks(session: Session, console: Console, request: Asked, machine: Machine) -> int:
    """Start the ranks and wait for them; or, as one of them (or alone), do the work."""
    from dcgen_convert.api.results import Evaluation
    from dcgen_convert.evaluation import summary
    from dcgen_convert.judging import drawing, evaluating
    from dcgen_convert.ranks import launch

    if launch.wanted(machine):
        Run(request.output, console, option="--out")
        assert session.result is not None  # `begin` was called
        return launch.run(session.argv, machine, request.output, console, session.result, lambda _: None)
    crew = session.join(machine.rank_timeout)
    if isinstance(crew, Member):
        return crew.serve(drawing.Helper(crew, console))
    document = Evaluation.of(evaluating.evaluate(request, console, crew)).document()
    console.result(document, summary.text(document))
    return 0


def clean(console: Console, run: str, keep: Literal["resume", "bundle"], yes: bool) -> int:
    """Show what a run folder holds; remove what nothing needs when the user said so, or says so on the terminal."""
    from dcgen_convert.stages.clean import text

    found = calls.clean(run, keep=keep, delete=yes, console=console)
    if not yes and found.freed and wants_live(console.stderr, {}) and sys.stdin.isatty():
        console.say(text(found.document()))
        if click.confirm("Remove it?", default=False, err=True):
            found = calls.clean(run, keep=keep, delete=True, console=console)
    hint = "" if found.status == "done" or not found.freed else "; nothing was removed, -y removes it"
    console.result(found.document(), text(found.document()) + hint)
    return 0


def finish(console: Console, done: Conversion | Rehearsed | Quantised | Adopted) -> int:
    """Show the result: the bundle's path, or the run folder when the conversion stopped before the bundle."""
    if isinstance(done, Rehearsed):
        console.result(done.document(), done.text())
        return 0
    path = done.run if isinstance(done, Conversion) and done.bundle is None else done.bundle
    console.result(done.document(), str(path))
    return 0


def _consents(lost: str, console: Console) -> bool:
    """Ask on a terminal whether work may be deleted; without one the answer is no."""
    if not (wants_live(console.stderr, {}) and sys.stdin.isatty()):
        return False
    console.warn(lost)
    return click.confirm("Delete it?", default=False, err=True)


def _require_push(repo: str | None, private: bool) -> None:
    """InputError for a --push-to that cannot work: not after days of work."""
    if repo is not None:
        from dcgen_convert.bundle.push import check_name

        check_name(repo)
    elif private:
        raise InputError("--private is said of the repository of --push-to, and none is named", "add --push-to REPO")


def _ask(job: Order, console: Console) -> None:
    """Say the cost first; on a terminal, let the user stop before hours are spent."""
    time = calls.plan_of(job.resolved).time
    low, likely, high = (duration(time[f"wall_hours{end}"] * 3600) for end in ("_low", "", "_high"))
    console.say(f"expected: {likely} ({low} to {high}) on {time['gpus']} x {time['device']} [{time['basis']}]")
    ask = time["wall_hours"] > ASK_ABOVE_HOURS and wants_live(console.stderr, {})
    if ask and not click.confirm("Go on?", default=True, err=True):
        raise InputError("not started", "add -y to skip the question")


def runs_text(found: Runs, folder: str) -> str:
    """One line for each run: state, size, age, folder, and the last stage that is done."""
    lines = [
        f"{run['state']:8}  {run['bytes'] / 1e9:9.2f} GB  {duration(run['age']):>10} old  {run['run']}"
        f"  ({run['stages'][-1] if run['stages'] else 'no stage'} is the last stage done)"
        for run in found.runs
    ]
    return "\n".join(lines) or f"no run folder in {folder}"
