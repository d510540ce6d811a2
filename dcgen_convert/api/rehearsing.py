"""`rehearse`: a conversion at full size on a few pictures, and what it tells of the real run."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from dcgen_convert.api import calls, command
from dcgen_convert.api.order import Order, default_name, require_folders, resolve
from dcgen_convert.api.order import order as order_of
from dcgen_convert.api.results import Rehearsed
from dcgen_convert.api.settings import JobSettings
from dcgen_convert.core import clock
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import write_json
from dcgen_convert.core.limits import require
from dcgen_convert.core.names import REHEARSAL
from dcgen_convert.planning import rehearsal
from dcgen_convert.planning.bill import bill
from dcgen_convert.planning.fit import decide
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.ranks.crew import SOLO, Crew
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Phase, Recipe

BUNDLE, RANDOM = "output", "random"  # folders in the run folder, beside those of the stages
LOGS = "log*.txt"  # of the ranks: they are open


@calls.explained()
def rehearse(
    source: str | Path,
    *,
    run_dir: str | Path | None = None,
    random: bool = False,
    pictures: int | None = None,
    steps: int | None = None,
    quiet: bool = False,
    **settings: Unpack[JobSettings],
) -> Rehearsed:
    """Run every stage of a conversion at full size on a few pictures; measure seconds and memory.

    Args:
        source: as in `convert`.
        run_dir: folder of the rehearsal, which takes rehearsal.json. None: ./runs/NAME-AE[-FORMAT]-rehearsal.
        random: take random weights of the right sizes for ``source``, a catalogue name, and for the autoencoder.
        pictures: to rehearse with. None: 2, or as many as are drawn at once where that takes a minute at most.
        steps: of each picture and each training. None: 2, and more of a training whose steps are short.
        quiet: only warnings on stderr.
        settings: see `api.settings.JobSettings`.

    Raises:
        InputError: a run folder that holds something else; and what `convert` raises.
    """
    job = order(source, settings, run_dir, random)
    sizes: dict[str, Any] = {"random": random, "pictures": pictures, "steps": steps}
    if calls.needs_ranks(job):
        values = {**settings, **sizes, "run_dir": job.run_dir, "quiet": quiet}
        document = command.run("rehearse", str(source), values)
        return Rehearsed.of(document)
    return carry_out(job, calls.console_of(quiet, job.run_dir), **sizes)


def order(source: str | Path, settings: Mapping[str, Any], run_dir: str | Path | None, random: bool) -> Order:
    """The order for a rehearsal, with the recipe of the real run.

    Raises:
        InputError: ``run_dir`` holds something else; with ``random`` a source that is no catalogue name.
    """
    require_folders(run_dir=run_dir)
    if random:
        resolved = resolve(source, settings)
        if resolved.identity.entry is None:
            raise InputError(
                f"random weights can be made for the models of the catalogue, and {source} is none of them",
                "dcgen-convert recipes list shows their names; or leave --random out",
            )
    else:
        resolved = order_of(source, settings, None, None).resolved
    folder = Path(run_dir or Path("runs") / f"{default_name(resolved)}-rehearsal").absolute()
    held = [path for path in folder.glob("*") if not path.match(LOGS)] if folder.is_dir() else []
    if held and not (folder / REHEARSAL).exists():
        raise InputError(f"{folder} holds something that is no rehearsal", "choose another folder with --run-dir")
    return Order(resolved, folder, folder / BUNDLE)


def carry_out(
    job: Order,
    console: Console,
    crew: Crew = SOLO,
    *,
    random: bool = False,
    pictures: int | None = None,
    steps: int | None = None,
) -> Rehearsed:
    """Rehearse in this process. crew: the other ranks. The rest: as in `rehearse`."""
    require(pictures=pictures, steps=steps)
    import torch

    from dcgen_convert.stages.layout import memory_per_rank

    _empty(job.run_dir)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    file, gpu = job.run_dir / REHEARSAL, torch.cuda.is_available()
    write_json(file, {"schema": rehearsal.SCHEMA, "status": "running"})
    resolved, memory = job.resolved, memory_per_rank(crew.world)
    sizes = shapes_of(resolved.recipe, resolved.identity)

    def micro_batch(phase: Phase) -> int:
        return decide(resolved.recipe, phase, sizes, crew.world, memory).micro_batch

    name = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores"
    device = rehearsal.device_of(name, gpu)
    recipe, told = rehearsal.small(resolved.recipe, sizes, crew.world, device, micro_batch, pictures, steps)
    for line in told:
        console.say(f"rehearsal: {line}")
    if random:
        recipe = _random(resolved, recipe, job.run_dir / RANDOM, console)
    little = replace(job, resolved=Resolved(recipe, resolved.origins, resolved.machine))
    begun = time.monotonic()
    with clock.measuring(torch.cuda.synchronize if gpu else lambda: None) as running:
        done = calls.carry_out(little, console, crew, force=True)
    rows = rehearsal.rows(done.stages, running.figures(), time.monotonic() - begun)
    assert done.bundle is not None, "no stage was left out"
    result = Rehearsed(
        file=file,
        run=job.run_dir,
        bundle=done.bundle,
        random=random,
        conversion=rehearsal.conversion_of(resolved.recipe),
        recipe=recipe.model_dump(mode="json"),
        device=name,
        ranks=crew.world,
        gpu=gpu,
        memory=memory,
        stages=rows,
        time={},
    )
    write_json(file, result.document())
    found = rehearsal.read(file, resolved.recipe)
    result = replace(result, time=bill(resolved.recipe, sizes, crew.world, found))
    write_json(file, result.document())
    return result


def _random(resolved: Resolved, recipe: Recipe, folder: Path, console: Console) -> Recipe:
    """The recipe with random weights for its source and, where its autoencoder is not embedded, for that too."""
    from dcgen_convert.families import catalog
    from dcgen_convert.networks import random_source

    entry = resolved.identity.entry
    assert entry is not None, "order checked it"
    source = random_source.write(entry, folder / entry.name, recipe.seed, console)
    changes = {"source": str(source)}
    autoencoder = catalog.find_autoencoder(recipe.ae)
    if autoencoder is not None and (autoencoder.repo or autoencoder.given):
        target = random_source.write_autoencoder(autoencoder, folder / autoencoder.alias, recipe.seed)
        changes["ae"] = str(target)
    console.say(f"rehearsal: random weights in {folder}, no download; the pictures will be noise")
    return recipe.model_copy(update=changes)


def _empty(folder: Path) -> None:
    """Delete what an earlier rehearsal left in its folder."""
    if not (folder / REHEARSAL).exists():
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.match(LOGS):
            path.unlink()
