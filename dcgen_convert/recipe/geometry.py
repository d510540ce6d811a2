"""Sizes before and after the swap: factors, channels, patches, tokens; and the one rule on picture sizes.

Legend: f spatial compression of an autoencoder, c its latent channels, p patch in latent cells, side in px, tokens =
(side / (f p))^2.
"""

from __future__ import annotations

import math
from pathlib import Path

from dcgen_convert.checkpoint.source import check_scheduler
from dcgen_convert.core.errors import AccessError, InputError, RecipeError
from dcgen_convert.data import buckets
from dcgen_convert.families import Family, bases, catalog
from dcgen_convert.families.grid import MOST, Grid, autoencoder_grid
from dcgen_convert.networks import autoencoder_files
from dcgen_convert.recipe import sources
from dcgen_convert.recipe.schema import Recipe


def base_grid(source: str, offline: bool = True, base: str | None = None) -> Grid:
    """The latent space that the source was trained in, from the catalogue or from the configs beside it.

    A transformer that comes alone has the grid of ``base``, by default of the published model of its kind.
    """
    entry = catalog.find_source(source)
    if entry is not None:
        return Grid(entry.vae_factor, entry.vae_channels, entry.patch)
    config = sources.transformer_config(source, offline, base)
    known = sources.family_of(config, source)
    path = Path(source).expanduser()
    if path.is_dir() and (path / "vae" / "config.json").is_file():
        f, c = autoencoder_grid(sources.read_config(path / "vae" / "config.json"))
    elif base is not None:
        f, c = vae_grid(base, offline)
    elif path.exists():
        default = bases.base_of(known.name, config)
        if default is None:
            raise InputError(
                f"{source} has no autoencoder beside it", "name the pipeline that it belongs to: --base FOLDER|REPO"
            )
        f, c = default.factor, default.channels
    else:
        f, c = autoencoder_grid(sources.hub_json(source, "vae/config.json", offline))
    try:
        p = known.patch(config, c)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{source}: the transformer's config is damaged: {type(error).__name__}: {error}", "fetch it again"
        ) from error
    if not 0 < p <= MOST:
        raise InputError(
            f"{source}: the transformer's config and its autoencoder's give a patch of {p} cells",
            "do they belong together?",
        )
    return Grid(f, c, p)


def vae_grid(base: str, offline: bool) -> tuple[int, int]:
    """(f, c) of the autoencoder of a pipeline: catalogue name, folder or hub id."""
    entry = catalog.find_source(base)
    if entry is not None:
        return entry.vae_factor, entry.vae_channels
    path = Path(base).expanduser()
    if path.is_dir():
        return autoencoder_grid(sources.read_config(path / "vae" / "config.json"))
    return autoencoder_grid(sources.hub_json(base, "vae/config.json", offline))


def new_grid(ae: str, offline: bool = True, channels: int | None = None) -> Grid:
    """The latent space of the deep-compression autoencoder, or of its first ``channels``; patch 1."""
    entry, path = catalog.find_autoencoder(ae), Path(ae).expanduser()
    if entry is not None:
        f, c = entry.factor, entry.channels
    elif autoencoder_files.is_file(ae):
        f, c = autoencoder_grid(autoencoder_files.file_and_config(ae)[1])
    elif path.exists():
        f, c = autoencoder_grid(sources.read_config(path / "config.json", path / "vae" / "config.json"))
    else:
        f, c = autoencoder_grid(sources.hub_json(ae, "config.json", offline))
    if channels and channels > c:
        raise RecipeError(
            f"ae_channels is {channels}, but {ae} has {c} channels", f"use --ae-channels {c} or less, or leave it out"
        )
    return Grid(f, channels or c, 1)


def bucket_sizes(family: Family, config: dict, base: Grid, new: Grid, resolution: int) -> list[tuple[int, int]]:
    """(height, width) in px of the aspect-ratio buckets at ``resolution``: both grids' tokens, and the network's
    halvings, divide theirs.

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


def check(recipe: Recipe) -> None:
    """Every picture side must be a multiple of both f*p, or the grids cannot meet, and one that the model can work on.

    A hub id whose config is not here yet is left to the stage that downloads it.
    Raises:
        RecipeError: naming the setting and the nearest sizes that work; buckets for a family that has no use for them.
        InputError: a scheduler that the family cannot follow.
    """
    try:
        grids = {
            "source": base_grid(recipe.source, base=recipe.base),
            "autoencoder": new_grid(recipe.ae, channels=recipe.ae_channels),
        }
        config = sources.transformer_config(recipe.source, offline=True, base=recipe.base)
    except AccessError:
        return
    sides = {"data.resolution": recipe.data.resolution}
    sides |= {f"adapt.phases.{i}.resolution": phase.resolution for i, phase in enumerate(recipe.adapt.phases)}
    for key, side in sides.items():
        for whose, grid in grids.items():
            if side % grid.token_px or side < grid.token_px:
                low, high = side // grid.token_px * grid.token_px, -(-side // grid.token_px) * grid.token_px
                raise RecipeError(
                    f"{key} is {side} px, which is no multiple of the {whose}'s f*p "
                    f"= {grid.f}*{grid.p} = {grid.token_px} px",
                    f"use {f'{low} or ' if low else ''}{high} px (--resolution)",
                )
    family = sources.family_of(config, recipe.source)
    for key, side in sides.items():
        for grid in grids.values() if key == "data.resolution" else (grids["autoencoder"],):
            cells, step = side // grid.f, family.grid_step(config)
            if cells % step:
                raise RecipeError(
                    f"{key} is {side} px, at f{grid.f} {cells} x {cells} cells; {family.name} models halve their "
                    "grid and need a "
                    f"multiple of {step}",
                    "use another --resolution, or an --ae of a smaller factor",
                )
    check_scheduler(Path(recipe.base or recipe.source).expanduser(), family)
    sources.check_few_steps(recipe, family, Path(recipe.base or recipe.source).expanduser())
    if recipe.data.buckets:
        for phase in recipe.adapt.phases:
            bucket_sizes(family, config, grids["source"], grids["autoencoder"], phase.resolution)
    only = family.only_side(config, grids["source"].f)
    if only and recipe.data.kind == "synthetic" and recipe.data.resolution != only:
        raise RecipeError(
            f"data.resolution is {recipe.data.resolution} px, but the pipeline of {recipe.source} draws {only} px only",
            f"use {only} px (--resolution), or give pictures of your own with --data",
        )
