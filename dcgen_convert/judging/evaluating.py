"""`dcgen-convert evaluate`: draw, measure, compare, and write down what came out."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from dcgen_convert.bundle import layout, lineage
from dcgen_convert.bundle.loading import family_of
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import write_json
from dcgen_convert.core.journal import Run, fingerprint
from dcgen_convert.evaluation import rows, summary
from dcgen_convert.evaluation.rows import BASE, CEILING, CONVERTED, FLOOR, OTHER, REFERENCE, Figures
from dcgen_convert.evaluation.summary import FILE, SCHEMA, STAGE
from dcgen_convert.judging.drawing import RoundTrip, fill
from dcgen_convert.judging.gallery import Gallery
from dcgen_convert.judging.measuring import FOLDER, Judges, Set, measured
from dcgen_convert.judging.order import Asked, Trial, settle
from dcgen_convert.judging.painter import Painter
from dcgen_convert.networks import pipelines
from dcgen_convert.ranks.crew import SOLO, Crew

TITLES = {CONVERTED: "converted", BASE: "base", FLOOR: "base with other seeds", CEILING: "round trip"}


def evaluate(asked: Asked, console: Console, crew: Crew = SOLO) -> dict[str, Any]:
    """Evaluate a bundle; returns the document that stands in evaluation.json.

    Args:
        crew: the other ranks. They help to draw and to measure.
    Raises:
        CheckFailed: a figure does not pass its gate. evaluation.json is written all the same.
        InputError, AccessError: as `order.settle`.
    """
    with Run(asked.output, console, option="--out").locked():
        trial = settle(asked, console)
        for note in trial.notes:
            console.say(f"evaluate: {note}")
        for name, reason in trial.left_out.items():
            console.say(f"evaluate: {name} is left out: {reason}")
        console.say(
            f"evaluate: {len(trial.prompts)} prompts ({trial.kind}); {', '.join(m.name for m in trial.measures)}"
        )
        galleries, drawn = _draw(trial, crew, console)
        found = _measure(trial, galleries, crew, console)
        document = _document(trial, galleries, drawn, rows.rows(found, trial.measures))
        write_json(asked.output / FILE, document)
        _write_card(trial, document, console)
    _judge(asked, document, console)
    return document


def _draw(trial: Trial, crew: Crew, console: Console) -> tuple[dict[str, Gallery], dict[str, int]]:
    """The galleries, filled: set -> gallery, and set -> pictures that were made now."""
    galleries = {CONVERTED: trial.gallery(TITLES[CONVERTED], trial.converted)}
    drawn = {CONVERTED: fill([galleries[CONVERTED]], trial.converted, crew, console)[0]}
    if trial.base is not None:
        galleries[BASE] = base = trial.gallery(TITLES[BASE], trial.base)
        galleries[FLOOR] = floor = trial.gallery(TITLES[FLOOR], trial.base, OTHER)
        drawn[BASE], drawn[FLOOR] = fill([base, floor], trial.base, crew, console)
        if trial.round_trip:
            trip = RoundTrip(base, trial.asked.bundle)
            about = trip.about(trial.converted.digest)
            galleries[CEILING] = replace(base, title=TITLES[CEILING], about=about)
            drawn[CEILING] = fill([galleries[CEILING]], trip, crew, console)[0]
    return galleries, drawn


def _measure(trial: Trial, galleries: Mapping[str, Gallery], crew: Crew, console: Console) -> dict[str, Figures]:
    """What the measures say of every set, in groups: memory does not grow with the number of pictures."""
    asked = trial.asked
    sets = {name: Set(one, one.folder / FOLDER, trial.jpeg) for name, one in galleries.items()}
    if trial.references is not None:
        name = trial.references.name
        place = asked.output / "pictures" / f"reference-{fingerprint(name)[:12]}" / FOLDER
        sets[REFERENCE] = Set(name, place, jpeg=False)
    made = {measure.name: measure for measure in trial.measures}
    where = trial.size, pipelines.device(), asked.offline, bool(trial.edits), trial.converted.frames
    judges = Judges([*made], asked.weights, trial.prompts, *where)
    return measured(sets, judges, made, crew, console)


def _document(
    trial: Trial, galleries: Mapping[str, Gallery], drawn: Mapping[str, int], table: list[dict[str, Any]]
) -> dict[str, Any]:
    asked, values = trial.asked, rows.values(table)
    judged = [gate.record(values[gate.name]) for gate in asked.gates if gate.name in values]
    sides = {CONVERTED: trial.converted.side, "measured": trial.size[0]}
    return {
        "schema": SCHEMA,
        "status": "done" if all(gate["passed"] for gate in judged) else "failed",
        "bundle": str(asked.bundle),
        "base": None if trial.base is None else trial.base.name,
        "prompts": trial.kind,
        "count": len(trial.prompts),
        "seed": asked.seed,
        "models": {name: _shown(by) for name, by in ((CONVERTED, trial.converted), (BASE, trial.base)) if by},
        "sides": sides | ({BASE: trial.base.side} if trial.base else {}),
        "jpeg": trial.jpeg,
        "reference": None
        if trial.references is None
        else {"name": trial.references.name, "count": trial.references.count},
        "weights": {key: value for key, value in asdict(asked.weights).items() if value},
        "measures": table,
        "values": values,
        "left_out": trial.left_out,
        "gates": judged,
        "notes": trial.notes,
        "pictures": {name: {"folder": str(one.folder), "drawn": drawn[name]} for name, one in galleries.items()},
        "evaluation": str(asked.output / FILE),
    }


def _shown(by: Painter) -> dict[str, Any]:
    """How a model drew."""
    found = {key: getattr(by, key) for key in ("digest", "steps", "guidance", "runtime", "dtype")}
    return {**found, "width": by.width} if by.width else found


def _write_card(trial: Trial, document: Mapping[str, Any], console: Console) -> None:
    """The figures into the manifest and the card of the bundle."""
    bundle = trial.asked.bundle
    kept = {
        key: document[key] for key in ("base", "prompts", "count", "seed", "sides", "jpeg", "reference", "measures")
    }
    try:
        layout.add_metrics(bundle, family_of(bundle), STAGE, lineage.without_places(kept))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        console.warn(f"{bundle} cannot be written: its card does not show the figures, {FILE} does")


def _judge(asked: Asked, document: Mapping[str, Any], console: Console) -> None:
    """CheckFailed for a gate that is not passed; InputError for one whose figure could not be had after all."""
    values = document["values"]
    lost = [gate for gate in asked.gates if gate.name not in values]
    if lost:
        raise InputError(
            f"--{lost[0].kind} {lost[0].name}: no picture gave this figure", f"see {document['evaluation']}"
        )
    failed = [gate.told(values[gate.name]) for gate in asked.gates if not gate.passes(values[gate.name])]
    if failed:
        console.say(summary.text(document))
        raise CheckFailed(f"{asked.bundle} does not pass: {'; '.join(failed)}", f"see {document['evaluation']}")
