"""The verbs that need more than one call: convert, plan, quantize; and how result documents are rendered."""

from __future__ import annotations

from pathlib import Path

import click

from dcgen_convert.console import Console, wants_live
from dcgen_convert.errors import InputError
from dcgen_convert.options import default_name, output_options, resolve
from dcgen_convert.progress import duration
from dcgen_convert.session import Session

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
    if not values["yes"]:
        _ask(resolved, console)
    from dcgen_convert import conversion

    doc = conversion.convert(
        resolved, run_dir, output, console, start=values["start"], until=values["until"], force=values["force"]
    )
    if values["push_to"] and doc.get("bundle"):
        from dcgen_convert.bundle.push import push

        doc = {**doc, "url": push(Path(doc["bundle"]), values["push_to"], values["private"], console)}
    return finish(console, doc)


def plan(session: Session, source: str, values: dict, gpu_memory: float) -> int:
    """Resolve and plan. Exit 4 when no micro-batch of one picture fits."""
    console = session.begin(**output_options(values))
    resolved = resolve(source, values)
    from dcgen_convert import plan as planning

    doc = planning.plan(resolved, gpu_bytes=gpu_memory * 2**30)
    console.result(doc, planning.render(doc))
    return 0 if doc["status"] == "feasible" else 4


def quantize(session: Session, source: str, values: dict) -> int:
    """SVDQuant of a checkpoint as it is."""
    shown = output_options(values)
    from dcgen_convert.schema import Calibration, Quantize
    from dcgen_convert.sources import short_name

    count = values["calibration"]
    section = Quantize(
        format=values["quant_format"],
        rank=values["rank"],
        container=values["container"],
        dense=values["dense"],
        calibration=Calibration(prompts=count or 1),
    )
    output = Path(values["output"] or f"{short_name(source)}-{section.format}").absolute()
    console = session.begin(**shown)
    from dcgen_convert.svdquant.direct import Drawing, quantize_source

    drawn = ("prompts", "resolution", "steps", "guidance", "seed")
    drawing = Drawing(data_free=count is None, **{key: values[key] for key in drawn})
    return finish(console, quantize_source(source, output, section, drawing, console))


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
    from dcgen_convert import plan as planning

    time = planning.plan(resolved)["time"]
    console.say(f"expected: {duration(time['gpu_hours'] * 3600)} on {time['device']} [{time['basis']}]")
    ask = time["gpu_hours"] > ASK_ABOVE_HOURS and wants_live(console.stderr, {})
    if ask and not click.confirm("Go on?", default=True, err=True):
        raise InputError("not started", "add -y to skip the question")
