"""Sizes before and after the swap: factors, channels, patches, tokens; and the one rule on picture sizes.

Legend: f spatial compression of an autoencoder, c its latent channels, p patch in latent cells, side in px, tokens =
(side / (f p))^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcgen_convert import bases, catalog, sources
from dcgen_convert.errors import AccessError, InputError, RecipeError
from dcgen_convert.schema import Recipe

MOST = 1 << 16  # of a factor, of channels, of a patch: more is damage


@dataclass(frozen=True)
class Grid:
    """One latent space. f: px per latent cell side; c: channels; p: cells per token side."""

    f: int
    c: int
    p: int

    @property
    def token_px(self) -> int:
        """px per token side."""
        return self.f * self.p

    def tokens(self, side: int) -> int:
        """Tokens of a square picture."""
        return (side // self.token_px) ** 2


def base_grid(source: str, offline: bool = True, base: str | None = None) -> Grid:
    """The latent space that the source was trained in, from the catalogue or from the configs beside it.

    A transformer that comes alone has the grid of ``base``, by default of the published model of its kind.
    """
    entry = catalog.find_source(source)
    if entry is not None:
        return Grid(entry.vae_factor, entry.vae_channels, entry.patch)
    config = sources.transformer_config(source, offline, base)
    known = sources.CLASSES[sources.model_class(config, source)]
    path = Path(source).expanduser()
    if path.is_dir() and (path / "vae" / "config.json").is_file():
        f, c = autoencoder_grid(sources.read_config(path / "vae" / "config.json"))
    elif base is not None:
        f, c = vae_grid(base, offline)
    elif path.exists():
        default = bases.base_of(known.name, config)
        if default is None:
            raise InputError(f"{source} has no autoencoder beside it", "name the pipeline that it belongs to: --base FOLDER|REPO")
        f, c = default.factor, default.channels
    else:
        f, c = autoencoder_grid(sources.hub_json(source, "vae/config.json", offline))
    try:
        p = known.patch(config, c)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{source}: the transformer's config is damaged: {type(error).__name__}: {error}", "fetch it again") from error
    if not 0 < p <= MOST:
        raise InputError(f"{source}: the transformer's config and its autoencoder's give a patch of {p} cells", "do they belong together?")
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


def new_grid(ae: str, offline: bool = True) -> Grid:
    """The latent space of the deep-compression autoencoder; patch 1."""
    entry = catalog.find_autoencoder(ae)
    if entry is not None:
        return Grid(entry.factor, entry.channels, 1)
    path = Path(ae).expanduser()
    config = (
        sources.read_config(path / "config.json", path / "vae" / "config.json")
        if path.exists()
        else sources.hub_json(ae, "config.json", offline)
    )
    return Grid(*autoencoder_grid(config), 1)


def autoencoder_grid(config: dict) -> tuple[int, int]:
    """(f, c) of an autoencoder's config, whatever its class."""
    levels = config.get("dim_mult") or config.get("encoder_block_out_channels") or config.get("block_out_channels")
    factor = config.get("spatial_compression_ratio")
    if factor is None and isinstance(levels, (list, tuple)) and len(levels) <= 16:
        factor = 2 ** (len(levels) - 1)
    channels = config.get("z_dim" if "dim_mult" in config else "latent_channels")
    if not all(type(number) is int and 0 < number <= MOST for number in (factor, channels)):
        raise RecipeError(
            f"autoencoder config ({config.get('_class_name', 'no class')}) lacks block_out_channels or latent_channels",
            "use an AutoencoderDC or AutoencoderKL folder",
        )
    return factor, channels


def check(recipe: Recipe) -> None:
    """Every picture side must be a multiple of both f*p, or the grids cannot meet.

    A hub id whose config is not here yet is left to the stage that downloads it.
    Raises:
        RecipeError: naming the setting and the nearest sizes that work.
    """
    try:
        grids = {"source": base_grid(recipe.source, base=recipe.base), "autoencoder": new_grid(recipe.ae)}
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
