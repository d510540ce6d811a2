"""The function of the verb `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcgen_convert.api import command
from dcgen_convert.api.calls import console_of, explained, require_alone
from dcgen_convert.api.order import require_folders
from dcgen_convert.api.results import Evaluation
from dcgen_convert.core.console import Console
from dcgen_convert.core.disk import require_writable
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.limits import PICTURES
from dcgen_convert.core.limits import require as require_range
from dcgen_convert.ranks import launch
from dcgen_convert.ranks.machine import Machine

if TYPE_CHECKING:
    from dcgen_convert.judging.order import Asked

WEIGHTS = ("clip", "dino", "pickscore", "inception", "detector")
PLACES = (*WEIGHTS, "against", "prompts", "sources", "reference", "out")


@explained()
def evaluate(  # noqa: PLR0913  every option of the verb by its name
    bundle: str | Path,
    *,
    against: str | Path | None = None,
    prompts: str | Path | None = None,
    sources: str | Path | None = None,
    count: int = 256,
    metrics: str | Sequence[str] | None = None,
    clip: str | Path | None = None,
    dino: str | Path | None = None,
    pickscore: str | Path | None = None,
    inception: str | Path | None = None,
    detector: str | Path | None = None,
    reference: str | Path | None = None,
    jpeg: bool | None = None,
    resolution: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    min: Sequence[str] = (),
    max: Sequence[str] = (),
    gpus: int | None = None,
    out: str | Path | None = None,
    offline: bool = False,
    quiet: bool = False,
    console: Console | None = None,
) -> Evaluation:
    """Compare the pictures of ``bundle`` with those of its base, on the same prompts and seeds.

    The pictures are kept in ``out``, so the same call draws only what is missing. With ``gpus`` above 1 the command
    dcgen-convert does the work, in processes of its own.

    Args:
        against: bundle or source to compare with. None: the base that the manifest names, if it is on this machine.
        prompts: in any form that `convert` takes, or "mjhq:FOLDER". None: those of the bundle's recipe, else built-in
            ones. Of a model that edits: instructions; a table with the columns source and caption; or "tiny-edits".
        sources: folder of the pictures that a model which edits is given, the first one with the first instruction.
            None: ``prompts`` says them.
        count: number of prompts.
        metrics: names of measures, as a list or with commas between them. None: all that can run with what is at hand.
        clip, dino, pickscore, inception, detector: weights of the measures: folder, hub id or file.
        reference: folder of pictures to compare with too, or "mjhq:FOLDER".
        jpeg: whether drawn pictures go through JPEG before they are measured. None: where there are reference pictures.
        resolution: side in px. None: the bundle's own.
        steps, guidance: of both models. None: each model's own.
        seed: of the first picture; picture i has ``seed`` + i.
        min, max: gates, "NAME=VALUE" each: the smallest or largest value that passes.
        gpus: number of ranks on this host.
        out: folder of the pictures and of evaluation.json. None: BUNDLE-evaluation beside the bundle.
        offline: use local files and the cache only.
        quiet: only warnings on stderr.
        console: where to speak instead.

    Raises:
        CheckFailed: a figure does not pass its gate (evaluation.json is written all the same), or a damaged bundle.
        InputError: not a bundle, or a size, a prompt, a measure or a gate that cannot be.
        AccessError: weights of a measure that was asked for are not at hand.
    """
    from dcgen_convert.judging import evaluating

    values = {name: value for name, value in locals().items() if name not in ("evaluating", "quiet", "console")}
    request = request_of(values)
    require_alone()
    if launch.wanted(Machine(gpus)):
        names = None if request.metrics is None else ",".join(request.metrics)
        values |= {"metrics": names, "out": request.output, "quiet": quiet}
        return Evaluation.of(command.run("evaluate", str(values.pop("bundle")), values))
    return Evaluation.of(evaluating.evaluate(request, console or console_of(quiet)))


def request_of(values: Mapping[str, Any]) -> Asked:
    """The keyword arguments of `evaluate` as a request, checked.

    Raises:
        InputError: not a bundle, a number out of its range, a name that is empty, or a gate of another form.
        CheckFailed: the bundle is unfinished.
    """
    from dcgen_convert.bundle import manifest
    from dcgen_convert.evaluation import gates
    from dcgen_convert.evaluation.measure import Weights
    from dcgen_convert.judging.order import Asked

    places = {name: None if values[name] is None else str(values[name]) for name in PLACES}
    require_folders(**places)
    require_range(**{name: values[name] for name in ("resolution", "steps", "guidance", "seed", "gpus")})
    if not 2 <= values["count"] <= PICTURES:
        raise InputError(f"count is {values['count']}", f"give a number from 2 to {PICTURES:,}")
    bundle, out = Path(values["bundle"]), places["out"]
    output = output_of(bundle, None if out is None else Path(out))
    require_writable(output, "--out")
    manifest.read(bundle)  # before the folder of the evaluation is made
    names = values["metrics"]
    names = names.split(",") if isinstance(names, str) else names
    return Asked(
        bundle=bundle,
        output=output,
        against=places["against"],
        prompts=places["prompts"],
        sources=places["sources"],
        count=values["count"],
        metrics=None if names is None else tuple(name.strip() for name in names),
        weights=Weights(**{name: places[name] for name in WEIGHTS}),
        reference=places["reference"],
        jpeg=values["jpeg"],
        side=values["resolution"],
        steps=values["steps"],
        guidance=values["guidance"],
        seed=values["seed"],
        offline=bool(values["offline"] or os.environ.get("HF_HUB_OFFLINE")),
        gates=tuple(gates.parse(values["min"], values["max"])),
    )


def output_of(bundle: Path, output: Path | None) -> Path:
    """Folder of an evaluation: the one that was given, else BUNDLE-evaluation beside the bundle."""
    bundle = bundle.absolute()
    return (output or bundle.with_name(f"{bundle.name}-evaluation")).absolute()
