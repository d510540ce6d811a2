"""What the other ranks do when rank 0 shares a task (`crew.share`): the same functions that rank 0 runs, by name."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import Run
from dcgen_convert.ranks.crew import Member
from dcgen_convert.ranks.machine import Machine
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Recipe


class Performer:
    """Runs tasks on a rank that is not 0; the job is made when the first one comes."""

    def __init__(self, crew: Member, console: Console) -> None:
        self.crew, self.console = crew, console
        self._document: dict[str, Any] = {}
        self._job = None

    def __call__(self, document: dict[str, Any], task: str, arguments: dict[str, Any]) -> None:
        self.console.say(f"task {task}")
        job = self._prepared(document)
        if task == "pictures":
            from dcgen_convert.stages import pictures

            pictures.draw_share(job, self.crew)
        elif task == "latents":
            from dcgen_convert.stages import latents

            latents.encode_share(job, self.crew, **arguments)
        elif task == "captions":
            from dcgen_convert.stages import latents

            latents.caption_share(job, self.crew)
        elif task == "train-head":
            from dcgen_convert.stages import align_head

            align_head.train(job, **arguments)
        elif task == "adapt":
            from dcgen_convert.stages import adapt

            adapt.train_phase(job, **arguments)
        elif task == "calibration":
            from dcgen_convert.stages import quantize

            quantize.record_share(job, self.crew)
        elif task == "blocks":
            from dcgen_convert.stages import quantize

            quantize.quantize_share(job, self.crew, **arguments)
        else:
            raise ValueError(f"no task is called {task!r}")

    def _prepared(self, document: dict[str, Any]):
        from dcgen_convert.stages.job import prepare

        if self._job is None or document != self._document:
            path = Path(document["run"])
            if not (path / "recipe.json").is_file():
                raise InputError(
                    f"{socket.gethostname()} does not see the run folder {path}",
                    "put --run-dir on a file system that all hosts share",
                )
            resolved = Resolved(Recipe.model_validate(document["recipe"]), {}, Machine(**document["machine"]))
            self._job = prepare(resolved, Run(path, self.console), self.console, self.crew)
            self._document = document
        return self._job
