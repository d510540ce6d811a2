"""What the other ranks do when rank 0 shares a task (`crew.share`): the same functions that rank 0 runs, by name."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcgen_convert.core import names
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import Run
from dcgen_convert.ranks.crew import Member
from dcgen_convert.ranks.machine import Machine
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages import folders, memory
from dcgen_convert.stages.job import Job, prepare


def tasks_of(job: Job, crew: Member, arguments: dict[str, Any]) -> dict[str, tuple[str, Callable[[], object]]]:
    """Name of a task -> the stage that shares it, and what a rank does."""
    from dcgen_convert.stages import adapt, align_head, latents, pictures, quantize

    job = job.of_expert(arguments.pop("expert", ""))
    own = job.expert.of
    return {
        "pictures": (folders.DATA, lambda: pictures.draw_part(job.of_set(arguments["of"]), crew)),
        "latents": (
            folders.LATENTS,
            lambda: latents.encode_part(job.of_set(arguments["of"]), crew, arguments["spans"]),
        ),
        "captions": (folders.LATENTS, lambda: latents.caption_part(job.of_set(arguments["of"]), crew)),
        "fit-head": (own(folders.ALIGN_HEAD), lambda: align_head.fit_part(job, crew, **arguments)),
        "train-head": (own(folders.ALIGN_HEAD), lambda: align_head.train(job, **arguments)),
        "adapt": (own("adapt-{number}"), lambda: adapt.train_phase(job, **arguments)),
        "calibration": (folders.QUANTIZE, lambda: quantize.record_part(job, crew, **arguments)),
        "blocks": (folders.QUANTIZE, lambda: quantize.quantize_part(job, crew, **arguments)),
    }


class Performer:
    """Runs tasks on a rank that is not 0; the job is made when the first one comes."""

    def __init__(self, crew: Member, console: Console) -> None:
        self.crew, self.console = crew, console
        self._job: Job | None = None

    def __call__(self, document: dict[str, Any], task: str, arguments: dict[str, Any]) -> None:
        self.console.say(f"task {task}")
        job = self._job = self._job or self._prepare(document)
        stage, perform = tasks_of(job, self.crew, arguments)[task]
        with memory.named(stage.format(**arguments)):
            perform()

    def _prepare(self, document: dict[str, Any]) -> Job:
        path = Path(document["run"])
        if not (path / names.RECIPE).is_file():
            raise InputError(
                f"{socket.gethostname()} does not see the run folder {path}",
                "put --run-dir on a file system that all hosts share",
            )
        resolved = Resolved(Recipe.model_validate(document["recipe"]), {}, Machine(**document["machine"]))
        job = prepare(resolved, Run(path, self.console), self.console, self.crew)
        # rank 0 has read every byte of the source; once is enough
        job.source.known.update({name: digest for name, (_, digest) in document["source"].items()})
        return job
