"""What is said of a phase while it trains: the measures of `watch.metrics` on its sample grids, and early verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.journal import MARKER
from dcgen_convert.core.names import MEASURES
from dcgen_convert.data import given, images
from dcgen_convert.data.held_out import held_out_rows
from dcgen_convert.evaluation import curves, measures, previews, verdicts
from dcgen_convert.evaluation.measure import Measure
from dcgen_convert.evaluation.previews import Judged, Shown
from dcgen_convert.stages import captions, edited, judged
from dcgen_convert.stages.job import Job
from dcgen_convert.train.watch import kept_lines

if TYPE_CHECKING:
    from PIL.Image import Image

ALWAYS = ("sharpness", "colour")  # measured too: they need no network, and the verdicts read them


def require(job: Job) -> None:
    """Refuse measures that cannot run in a phase that is still to be trained, before any work is done.

    Raises:
        InputError: a name or a caption that cannot be, or too few pictures. AccessError: weights are not at hand.
    """
    for number in range(1, len(job.recipe.adapt.phases) + 1):
        if job.recipe.watch.measures and not all((own.folders.adapt(number) / MARKER).exists() for own in job.experts):
            texts = _captions(job.of_phase(number))
            if held_out_rows(len(texts)) < 2:
                raise InputError(
                    f"watch.metrics compares at least 2 pictures, and of {len(texts)} only one is kept apart",
                    "give 40 pictures or more, or set watch.metrics to none",
                )
            _chosen(job, number, texts)


def found(job: Job, number: int, metrics: Mapping[str, Any]) -> list[str]:
    """The verdicts on phase ``number`` when it is done. metrics: of the phase."""
    return [str(verdict) for verdict in verdicts.of(curves.read(job.folders.adapt(number), metrics))]


class Watched:
    """The measures of one phase. The networks work on the CPU: the device is full of what the training needs."""

    def __init__(self, job: Job, number: int) -> None:
        self.job, self.number, self.folder = job, number, job.folders.adapt(number)
        self._trips: Judged | None = None  # the same for every grid
        self._said: set[str] = set()

    def measure(
        self,
        step: int,
        drawn: Sequence[Shown],
        trips: Sequence[Shown],
        texts: list[str],
        sources: Sequence[Image] = (),
    ) -> None:
        """Measure the drawn pictures of a grid, or its videos, beside the round trips, and write a line for each
        measure.

        Args:
            sources: of a model that edits, what each picture was made from; of one that draws videos from a picture,
                that picture.
        """
        if not self.job.recipe.watch.measures:
            return
        chosen = self._measures
        self._trips = self._trips or previews.seen(trips, texts, chosen, sources)
        table = previews.lines(previews.seen(drawn, texts, chosen, sources), self._trips, chosen)
        file, place = self.folder / MEASURES, {"step": step, "phase": self.folder.name}
        kept_lines(file, lambda line: line["step"] < step)  # a kill may have come between these lines and the grid
        with open(file, "a", encoding="utf-8") as lines:
            lines.write("".join(json.dumps({**place, **line}) + "\n" for line in table))
        noun = images.NOUNS[self.job.family.axes]
        told = ", ".join(
            f"{line['measure']} {line['value']:.4g}"
            + (f" ({previews.BESIDE} {line['round_trip']:.4g})" if "round_trip" in line else "")
            for line in table
        )
        self.job.console.say(f"{self.folder.name}: after step {step}, {len(texts)} {noun}: {told}")
        self.job.console.scalars(self.folder.name, step, {line["measure"]: line["value"] for line in table})

    def look(self) -> None:
        """Say each verdict on the training so far when it is given first."""
        for verdict in verdicts.of(curves.read(self.folder)):
            if verdict.sign not in self._said:
                tell = self.job.console.warn if verdict.grave else self.job.console.say
                tell(f"{self.folder.name}: {verdict}")
                self._said.add(verdict.sign)

    @cached_property
    def _measures(self) -> list[Measure]:
        return _chosen(self.job, self.number, _captions(self.job.of_phase(self.number)))


def _chosen(job: Job, number: int, texts: Sequence[str]) -> list[Measure]:
    names = dict.fromkeys((*job.recipe.watch.measures, *ALWAYS))
    side, weights = job.recipe.adapt.phases[number - 1].resolution, judged.weights(job.recipe)
    return measures.chosen(
        names,
        weights,
        texts,
        side=side,
        offline=job.identity.offline,
        edited=edited.tried(job.of_phase(number)),
        moving=job.frames > 0,
        recipe=True,
    )[0]


def _captions(job: Job) -> list[str]:
    """The captions of the pictures of ``job``; those that were taken, where the user's data are gone since."""
    data, index = job.recipe.data, job.folders.data / images.INDEX
    if data.kind != "folder":
        return captions.texts_of(job, data.count)
    if index.exists() and not given.are_here(job.pictures_from):
        return [picture.caption for picture in images.read_index(index, job.folders.data)]
    return [picture.caption for picture in job.taken[0]]
