"""The sample grid of a phase: the same captions and the same noise every time, beside the autoencoder's round trip.

The conditions come from held-out rows of the latent cache, so no text encoder is loaded while a model trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from dcgen_convert.core import clock
from dcgen_convert.core.files import replacing
from dcgen_convert.core.pixels import to_image
from dcgen_convert.data import buckets, videos
from dcgen_convert.data.cache import LatentCache
from dcgen_convert.evaluation.grids import films, grid, strips
from dcgen_convert.families import Family, Text
from dcgen_convert.families.base import references_of
from dcgen_convert.networks import autoencoders, pipelines
from dcgen_convert.stages.job import Job
from dcgen_convert.stages.watched import Watched
from dcgen_convert.train.objective import Velocity, drop_text, noised, shift_t
from dcgen_convert.train.watch import sheet_of

Combine = Callable[[Tensor, Tensor, float], Tensor]  # `Family.guided`
EDITED = {2: "what is edited", 3: "the first frame"}  # title of the column of references, by the axes of a latent


def noise_levels(family: Family, steps: int, tokens: int, scheduler: dict[str, Any]) -> Tensor:
    """(steps + 1,) descending levels t, the last 0: spaced as the bundle samples, or over a DDPM schedule."""
    if family.prediction == "epsilon":
        times = family.noise_times()
        places = torch.linspace(len(times) - 1, 0, steps + 1).round().long()[:-1]
        return torch.cat([times[places], torch.zeros(1, dtype=times.dtype)]).float()
    return shift_t(torch.linspace(1, 0, steps + 1, dtype=torch.float64), family.shift(tokens, scheduler)).float()


def levels_within(levels: Tensor, within: tuple[float, float]) -> Tensor:
    """Of the ``levels`` of a drawing those of a network that draws at low <= t < high, and 0 at the end.

    The last step leads from there to 0 at once: to the network's guess of the picture. Where no level lies within, the
    middle is taken.
    """
    low, high = within
    if (low, high) == (0.0, 1.0):
        return levels
    own = levels[(levels >= low) & ((levels < high) | (high == 1)) & (levels > 0)]
    return torch.cat([own if len(own) else levels.new_tensor([(low + high) / 2]), levels.new_zeros(1)])


def sample(
    velocity: Velocity, z: Tensor, levels: Tensor, text: Text, null: Text, guidance: float, combine: Combine | None
) -> Tensor:
    """Euler steps of dz/dt = v from noise z (B, C, h, w) at levels[0] down to levels[-1].

    Args:
        combine: the family's classifier-free guidance of two passes; None: g goes into the network.
    """
    for t, following in pairwise(levels.to(z.device)):
        times = t.expand(len(z))
        g = torch.full_like(times, 1.0 if combine else guidance)
        v = velocity(z, times, text, g)
        if combine and guidance != 1:
            v_0 = velocity(z, times, null, g)
            v = combine(v, v_0, guidance)
        z = z + (following - t) * v
    return z


def shown(family: Family, pixels: Tensor) -> Tensor:
    """What a sheet shows of pixels: a picture (3, H, W) itself, of a video (3, F, H, W) its middle frame."""
    return pixels if family.axes == 2 else pixels[:, pixels.shape[1] // 2]


def frames_of(pixels: Tensor) -> list[Image]:
    """The frames of a video (3, F, H, W), or a picture (3, H, W) as its only one."""
    return [to_image(one) for one in ([pixels] if pixels.ndim == 3 else pixels.unbind(1))]


def drawing(
    job: Job, rows: LatentCache, folder: Path, watched: Watched | None = None
) -> Callable[[Velocity, int], None]:
    """A function (velocity, step) that draws the grid to `sheet_of` and the console's tracker.

    A network that draws at a part of the noise levels alone goes through those: from the noised latents of the rows, if
    it does not begin in full noise, to its guess of the picture.

    Every rank samples, because a partitioned network needs all ranks. Rank 0 decodes, has the pictures measured by
    ``watched``, and writes. Of videos a film of all frames lies beside it, if PyAV is there. Of a model that edits the
    first column shows what is edited, and of one that draws videos from a picture that picture, as the autoencoder
    gives it back: the rows hold its latents.
    """
    settings = job.recipe.bundle

    @torch.no_grad()
    def draw(velocity: Velocity, step: int) -> None:
        device, chosen = pipelines.device(), buckets.first_of_each(rows.spans, job.recipe.watch.pictures)
        latents, given = [], []  # by shape: (drawn, of the picture); of the first reference, if there is one
        for part in chosen:
            z0, text = rows.batch(part)
            text = {key: value.to(device) for key, value in text.items()}
            null = drop_text(text, rows.null, torch.ones(len(part), dtype=torch.bool, device=device))
            generators = [torch.Generator().manual_seed(job.recipe.seed * 1_000_003 % 2**63 + i) for i in part]
            noise = torch.stack([torch.randn(z0.shape[1:], generator=generator) for generator in generators]).to(device)
            levels = noise_levels(job.family, settings.steps, math.prod(z0.shape[2:]), job.scheduler)
            levels = levels_within(levels, job.expert.within)
            if job.expert.high < 1:
                noise = noised(z0.to(device), noise, levels[:1].to(device))
            combine = job.family.guided if job.family.guidance == "cfg" else None
            with clock.timed("grids", len(part) * settings.steps):
                sampled = sample(velocity, noise, levels, text, null, settings.guidance, combine)
            latents.append((sampled, z0))
            given += references_of(text)[:1]
        if job.crew.rank:
            return
        scale = job.recipe.latents.scale_override
        codec = autoencoders.load(job.target, device=device, scale=scale, console=job.console)
        columns = dict(zip((f"step {step}", "round trip"), zip(*latents, strict=True), strict=True))
        if len(given) == len(latents):
            columns = {EDITED[job.family.axes]: tuple(given), **columns}
        moving = job.family.axes == 3
        seen = {
            title: [frames_of(pixels) for z in parts for pixels in codec.decode(z)] for title, parts in columns.items()
        }
        if EDITED[3] in seen:  # after the first frame a reference is grey
            seen[EDITED[3]] = [frames[:1] for frames in seen[EDITED[3]]]
        pictures = {title: [frames[0] for frames in column] for title, column in seen.items()}
        captions = rows.captions([row for part in chosen for row in part])
        if watched:
            *_, drawn, trips = (seen if moving else pictures).values()
            watched.measure(step, drawn, trips, captions, *[*pictures.values()][:-2])
        sheet, file = strips(seen, captions) if moving else grid(pictures, captions), sheet_of(folder, step)
        file.parent.mkdir(exist_ok=True)
        if moving and videos.has_reader():
            videos.write_film(films(seen, captions), file.with_suffix(".mp4"), job.fps)
        with replacing(file) as temporary:
            sheet.save(temporary, format="PNG")
        job.console.picture(f"{folder.name}/samples", step, sheet)

    return draw
