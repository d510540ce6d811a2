"""The latent space after the swap, and the rules on picture sizes.

f is the spatial compression of an autoencoder, c the number of its latent channels, p the patch in latent cells. A
square picture of ``side`` px has (side / (f p))^2 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint import trust
from dcgen_convert.core.errors import AccessError, RecipeError
from dcgen_convert.data import buckets
from dcgen_convert.families import Family, authors, catalog
from dcgen_convert.families.grid import LTX, Grid, Time, autoencoder_grid, autoencoder_time
from dcgen_convert.networks import autoencoder_files
from dcgen_convert.recipe import sources
from dcgen_convert.recipe.alignment import alignment
from dcgen_convert.recipe.drawable import require_drawable
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.pictures import Data
from dcgen_convert.recipe.reader import Reader
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.recipe.videos import frames_of, require_frames


def new_grid(ae: str, offline: bool = True, channels: int | None = None, reader: Reader | None = None) -> Grid:
    """The latent space of the deep-compression autoencoder, or of its first ``channels``; patch 1."""
    if (entry := catalog.find_autoencoder(ae)) is not None:
        f, c, time = entry.factor, entry.channels, Time(entry.frames)
    else:
        config = config_of(ae, offline, reader or Reader())
        (f, c), time = autoencoder_grid(config), autoencoder_time(config)
    if channels and channels > c:
        raise RecipeError(
            f"ae_channels is {channels}, but {ae} has {c} channels", f"use --ae-channels {c} or less, or leave it out"
        )
    return Grid(f, channels or c, 1, time)


def config_of(ae: str, offline: bool, reader: Reader) -> dict[str, Any]:
    """Of an autoencoder that is not in the catalogue."""
    path = Path(ae).expanduser()
    if autoencoder_files.is_file(ae):
        return autoencoder_files.file_and_config(ae)[1]
    if path.exists():
        return reader.first(path / "config.json", path / "vae" / "config.json")
    return reader.hub(ae, "config.json", offline)


def training_frames(recipe: Recipe, source: Identity) -> int:
    """Frames of a training video, as `frames_of` gives them; of pictures 0, and the autoencoder is not asked."""
    if source.family.axes == 2:
        return 0
    return frames_of(recipe, source.family, new_grid(recipe.ae, source.offline, reader=source.reader).time)


def bucket_sizes(family: Family, config: dict, base: Grid, new: Grid, resolution: int) -> list[tuple[int, int]]:
    """(height, width) in px of the aspect-ratio buckets at ``resolution``.

    Every side is a whole number of tokens in both grids, also after the network has halved its grid.

    Args:
        config: of the source's transformer.
    Raises:
        RecipeError: the family or the resolution allows squares only.
    """
    table = family.table_side(config)
    step = math.lcm(base.token_px, new.token_px) * family.grid_step(config)
    longest = table and table * base.token_px
    if not family.any_shape:
        raise RecipeError(
            f"data.buckets: {family.name} models draw one shape of pictures only", "leave out data.buckets"
        )
    found = buckets.sizes(resolution, step, longest)
    if len(found) < 2:
        limit = f" and at most {longest} px, where the position table ends" if table else ""
        raise RecipeError(
            f"data.buckets: at {resolution} px only the square is left, because sides are multiples of {step} "
            f"px{limit}",
            "raise --resolution, or leave out data.buckets",
        )
    return found


def usual_size(family: Family, config: dict, base: Grid, new: Grid, px: int, buckets_kept: bool) -> buckets.Size:
    """(height, width) in px of what is drawn at ``px``: of the buckets the one of the family's usual shape.

    Args:
        buckets_kept: as `data.buckets` says; without them it is the square.
    Raises:
        RecipeError: as `bucket_sizes`.
    """
    if not buckets_kept:
        return px, px
    height, width = family.shape
    return buckets.nearest(bucket_sizes(family, config, base, new, px), width, height)


def check(recipe: Recipe, source: Identity) -> None:
    """Refuse picture sizes on which the two grids cannot meet, or on which the model cannot work.

    Only what is on this machine is asked. A hub id whose config is not here yet is left to the stage that downloads it.

    Raises:
        RecipeError: names the setting and the nearest sizes that work; or buckets for a family that has no use for
            them.
        InputError: a scheduler that the family cannot follow, or a few-step model that would lose its few steps.
    """
    try:
        old = source.here.grid
        new = new_grid(recipe.ae, channels=recipe.ae_channels, reader=source.reader)
        config, family = source.here.config, source.here.family
    except AccessError:
        return
    _require_axes(recipe, family)
    _require_flow_for_bell(recipe, family)
    require_frames(recipe, family, new.time)
    _require_time(recipe, family, old, new)
    _require_own_scale(recipe, source)
    authors.refuse(source.pipeline.index, source.pipeline.name, family)
    drawn = {f"{recipe.data_key(number)}.resolution": recipe.data_of(number) for number in recipe.sets}
    sides = {key: data.resolution for key, data in drawn.items()}
    sides |= {f"adapt.phases.{i}.resolution": phase.resolution for i, phase in enumerate(recipe.adapt.phases)}
    for key, side in sides.items():
        _require_tokens(key, side, {"source": old, "autoencoder": new})
    for key, side in sides.items():
        for grid in (old, new) if key in drawn else (new,):
            _require_halvings(key, side, grid, family.grid_step(config), family.name)
    pipeline = source.pipeline
    if pipeline.scheduler is not None:
        family.check_scheduler(pipeline.scheduler)
    sources.check_few_steps(recipe, family, pipeline.index)
    for number in recipe.sets:
        if recipe.data_of(number).buckets:
            _require_own_shape(recipe, number, family)
            for side in recipe.sides(number):
                bucket_sizes(family, config, old, new, side)
    alignment(recipe, source.here, new)  # refuses a target that the base does not have
    _require_shift(recipe)
    _require_only_side(recipe, drawn, family.only_side(config, old.f))
    require_drawable(recipe, source.here)
    for number in recipe.sets:
        _require_not_enlarged(recipe, number)


def _require_axes(recipe: Recipe, family: Family) -> None:
    """RecipeError for an autoencoder for videos and a family that draws pictures, or the other way round; and for what
    rewrites an autoencoder for pictures.
    """
    entry = catalog.find_autoencoder(recipe.ae)
    of_file = entry is None and autoencoder_files.is_file(recipe.ae)
    config = autoencoder_files.file_and_config(recipe.ae)[1] if of_file else {}
    video = (entry and entry.frames > 1) or config.get("_class_name") == trust.VIDEO_CLASS
    if video and family.axes == 2:
        raise RecipeError(
            f"{recipe.ae} is for videos, and {recipe.source} draws pictures", "use an --ae for pictures: dc-ae-f32"
        )
    if (entry or of_file) and not video and family.axes == 3:
        raise RecipeError(
            f"{recipe.ae} is for pictures, and {recipe.source} draws videos",
            "use an --ae for videos: FILE.pt:dc-ae-v-f32t4c32:SHA256",
        )
    rewritten = "ae_channels" if recipe.ae_channels else "latents.normalise"
    if family.axes == 3 and (recipe.ae_channels or recipe.latents.normalise != "none"):
        raise RecipeError(
            f"{rewritten} is set, which rewrites an autoencoder for pictures, and {recipe.source} draws videos",
            f"leave out {rewritten}",
        )


def _require_time(recipe: Recipe, family: Family, old: Grid, new: Grid) -> None:
    """RecipeError for an autoencoder whose tokens do not meet the base's in time, or that the family cannot follow."""
    if family.axes == 2:
        return
    if not new.time.meets(old.time):
        raise RecipeError(
            f"of {recipe.ae} {new.time.told}, and of the autoencoder of {recipe.source} {old.time.told}: their tokens "
            "do not meet in time",
            "use another --ae",
        )
    if new.time.frames != family.time.frames and family.mask_of_frames:
        raise RecipeError(
            f"a {family.name} model reads a mask with a number for each of the {family.time.frames} frames of a latent "
            f"frame, and {recipe.ae} makes one of {new.time.frames}",
            f"use an --ae of {family.time.frames} frames: FILE.pt:dc-ae-v-f32t4c32:SHA256",
        )


def _require_own_scale(recipe: Recipe, source: Identity) -> None:
    """RecipeError for a scaling factor where the autoencoder holds statistics of each channel."""
    if not recipe.latents.scale_override or catalog.find_autoencoder(recipe.ae) is not None:
        return
    if config_of(recipe.ae, True, source.reader).get("_class_name") in LTX:
        raise RecipeError(
            f"latents.scale_override is set, and {recipe.ae} holds mean and standard deviation of each channel",
            "leave out latents.scale_override; --set latents.scale_tolerance=N allows another size of the latents",
        )


def _require_flow_for_bell(recipe: Recipe, family: Family) -> None:
    """RecipeError for the weight over t where the loss is another one than flow's squared error."""
    if recipe.adapt.weighting != "bell":
        return
    others = {
        "a network that predicts epsilon": family.prediction == "epsilon",
        f"the objective {recipe.adapt.objective}": recipe.adapt.objective != "flow",
        "a phase of consistency": any(phase.consistency for phase in recipe.adapt.phases),
    }
    if other := next((name for name, found in others.items() if found), None):
        raise RecipeError(f"adapt.weighting is bell, and {other} has no such weight", "--set adapt.weighting=none")


def _require_own_shape(recipe: Recipe, number: int, family: Family) -> None:
    """RecipeError for buckets of pictures that the base draws, where it draws squares."""
    key, data = recipe.data_key(number), recipe.data_of(number)
    if data.kind != "folder" and len({*family.shape}) == 1:
        option = "--data FOLDER" if key == "data" else f"--set {key}.path=FOLDER"
        raise RecipeError(f"{key}.buckets keeps the shapes of your own pictures, drawn ones are squares", option)


def _require_not_enlarged(recipe: Recipe, number: int) -> None:
    """RecipeError when the pictures of a set are drawn smaller than they are used, and `min_side` does not allow it."""
    data, side, key = recipe.data_of(number), recipe.sides(number)[-1], recipe.data_key(number)
    if data.kind == "synthetic" and data.resolution < min(side, data.min_side or side):
        raise RecipeError(
            f"{key}.resolution is {data.resolution} px, but the pictures are used at {side} px",
            f"--set {key}.resolution={side} draws them at that size; --set {key}.min_side={data.resolution} allows "
            "them to be enlarged",
        )


def _require_only_side(recipe: Recipe, drawn: Mapping[str, Data], only: int | None) -> None:
    """RecipeError for pictures to draw, by their setting, of another size than the ``only`` one of the pipeline."""
    for key, data in drawn.items():
        if only and data.kind == "synthetic" and data.resolution != only:
            raise RecipeError(
                f"{key} is {data.resolution} px, but the pipeline of {recipe.source} draws {only} px only",
                f"use {only} px (--resolution), or give pictures of your own with --data",
            )


def _require_shift(recipe: Recipe) -> None:
    """RecipeError for a shift rule that no scheduler config can hold: flux2 is a line through two sizes at most."""
    sizes = sorted({phase.resolution for phase in recipe.adapt.phases})
    if recipe.adapt.shift == "flux2" and len(sizes) > 2:
        shown = ", ".join(map(str, sizes))
        raise RecipeError(
            f"adapt.shift is flux2, which cannot be written for the {len(sizes)} sizes {shown} px",
            "--set adapt.shift=model keeps the base's own rule, a number is one shift for all sizes",
        )


def _require_tokens(key: str, side: int, grids: dict[str, Grid]) -> None:
    """RecipeError when the setting ``key``, ``side`` px, is not a whole number of tokens in one of ``grids``."""
    for whose, grid in grids.items():
        if side % grid.token_px or side < grid.token_px:
            low, high = side // grid.token_px * grid.token_px, -(-side // grid.token_px) * grid.token_px
            raise RecipeError(
                f"{key} is {side} px, which is no multiple of the {whose}'s f*p "
                f"= {grid.f}*{grid.p} = {grid.token_px} px",
                f"use {f'{low} or ' if low else ''}{high} px (--resolution)",
            )


def _require_halvings(key: str, side: int, grid: Grid, step: int, family: str) -> None:
    """RecipeError when the cells of ``side`` px are no multiple of ``step``, by which the network halves its grid."""
    cells = side // grid.f
    if cells % step:
        raise RecipeError(
            f"{key} is {side} px, at f{grid.f} {cells} x {cells} cells; {family} models halve their "
            f"grid and need a multiple of {step}",
            "use another --resolution, or an --ae of a smaller factor",
        )
