"""Filling galleries, on one rank or on several. Rank 0 says what is missing; every rank draws its part of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgen_convert.core import pulse
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import CheckFailed
from dcgen_convert.families import pixel_memory
from dcgen_convert.judging import measuring
from dcgen_convert.judging.gallery import Gallery
from dcgen_convert.judging.painter import Painter
from dcgen_convert.networks import autoencoders, pipelines
from dcgen_convert.networks.at_once import AtOnce, release
from dcgen_convert.ranks.crew import Crew, Member

BATCH = 8  # pictures that are drawn together, if they are small enough
DRAW, ROUND_TRIP = "draw", "round trip"  # tasks


@dataclass(frozen=True)
class Share:
    """What is missing in a gallery: the places, and the batches of places that they lie in."""

    gallery: Gallery
    batches: list[list[int]]
    missing: set[int]

    def of(self, crew: Crew) -> Share:
        """What one rank does of it: every `world`-th batch."""
        return replace(self, batches=self.batches[crew.rank :: crew.world])


def fill(galleries: Sequence[Gallery], by: Painter | RoundTrip, crew: Crew, console: Console) -> list[int]:
    """Make the pictures that are not there; returns how many were made in each gallery.

    A model that fills several galleries is loaded once.
    """
    every = [_part(gallery, console) for gallery in galleries]
    made = [len(part.missing) for part in every]
    parts = [part for part in every if part.missing]
    if parts:
        label = "evaluate: " + " and ".join(part.gallery.title for part in parts)
        with console.progress(label, sum(made), "pictures") as bar:
            task = DRAW if isinstance(by, Painter) else ROUND_TRIP
            with crew.share(task, bar, together=False, parts=parts, by=by):
                make(parts, by, crew, bar, console)
        release()
    return made


def _part(gallery: Gallery, console: Console) -> Share:
    """Fixed groups of places, whatever the number of ranks; those in which a picture is missing.

    A group is drawn as a whole, as a picture is rounded otherwise in another batch. So one rank and several, and a call
    that was cut off, give the same files.
    """
    missing = gallery.missing(console)
    size = pixel_memory.together(BATCH, max(1, gallery.frames) * math.prod(gallery.size), pixel_memory.DRAWN)
    wanted = sorted({place // size for place in missing})
    batches = [list(range(number * size, min((number + 1) * size, len(gallery)))) for number in wanted]
    return Share(gallery, batches, set(missing))


def make(parts: Sequence[Share], by: Painter | RoundTrip, crew: Crew, bar: Any, console: Console) -> None:
    """This rank's part of all parts."""
    own = [part for part in (part.of(crew) for part in parts) if part.batches]
    if not own:
        return
    made = _drawn(own, by, console) if isinstance(by, Painter) else _passed(own, by, console)
    for gallery, place, pixels in made:
        if not torch.isfinite(pixels).all():
            raise CheckFailed(
                f"{gallery.title}: the picture of {gallery.prompts[place][:60]!r} holds numbers that are not finite",
                "dcgen-convert verify names the tensor",
            )
        gallery.add(place, pixels, crew.rank)
        bar.advance()


Made = Iterator[tuple[Gallery, int, Tensor]]


def _drawn(parts: Sequence[Share], painter: Painter, console: Console) -> Made:
    """(gallery, place, picture (3, H, W) or video (3, F, H, W) in [-1, 1]) of all that is missing, drawn by a model."""
    pipeline, family = painter.load()
    drawing = AtOnce("evaluate: drawing", console.warn)

    def draw(gallery: Gallery, places: Sequence[int]) -> Tensor:
        return pipelines.draw(
            family,
            pipeline,
            [gallery.prompts[place] for place in places],
            [gallery.seeds[place] for place in places],
            side=painter.side,
            width=painter.size[1],
            steps=painter.steps,
            guidance=painter.guidance,
            length=painter.length,
            references=gallery.references(places, painter.size),
            frames=max(1, painter.frames),
        )

    for part in parts:
        for places in part.batches:
            drawn = chain.from_iterable(drawing.parts(places, partial(draw, part.gallery)))
            for place, pixels in zip(places, drawn, strict=True):
                if place in part.missing:
                    yield part.gallery, place, pixels


@dataclass(frozen=True)
class RoundTrip:
    """The pictures of a gallery through the autoencoder of a bundle."""

    of: Gallery
    bundle: Path

    def about(self, digest: str) -> dict[str, Any]:
        """What the pictures depend on. digest: hash of the bundle's content."""
        height, width = self.of.size
        frames = {"frames": self.of.frames} if self.of.frames else {}
        frames |= {"width": width} if width != height else {}
        return {"side": height, **frames, "through": digest, "of": self.of.about}


def _passed(parts: Sequence[Share], trip: RoundTrip, console: Console) -> Made:
    """The same, by the autoencoder."""
    with pipelines.quiet_diffusers():
        codec = autoencoders.load(trip.bundle / "vae", torch.float32, device=pipelines.device(), console=console)
    if trip.of.frames:
        codec.model.register_to_config(first_alone=False)  # it is given whole videos, no picture with grey after it
    for part in parts:
        for place in filter(part.missing.__contains__, chain.from_iterable(part.batches)):
            pixels = next(trip.of.stream([place], part.gallery.size))[None]
            yield part.gallery, place, codec.decode(codec.encode(pixels))[0]
            pulse.bump()


class Helper:
    """Runs the tasks of `fill` and of `measuring.measured` on a rank that is not 0."""

    def __init__(self, crew: Member, console: Console) -> None:
        self.crew, self.console = crew, console

    def __call__(self, _: dict[str, Any], task: str, arguments: dict[str, Any]) -> None:
        self.console.say(f"task {task}")
        if task == measuring.TASK:
            measuring.work(**arguments, crew=self.crew, bar=self.crew)
        else:
            make(**arguments, crew=self.crew, bar=self.crew, console=self.console)
        release()
