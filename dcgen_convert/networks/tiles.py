"""Large pictures through any autoencoder: in tiles that overlap, and one after the other.

It follows from the size of the pictures alone, so that no picture depends on the memory that is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dcgen_convert.checkpoint import trust
from dcgen_convert.families import pixel_memory
from dcgen_convert.families.base import Network
from dcgen_convert.families.grid import LTX, autoencoder_grid, tile_sizes

TILED, TILE = pixel_memory.TILED, pixel_memory.TILE


def tile_of(vae: Network, height: int, width: int) -> int:
    """px of a tile's side for pictures or frames of this size, in px; 0: they are taken whole.

    LTX-2's takes all whole: a last tile of one cell, which its tiles can have, is too small for its mirrored edges.
    """
    if type(vae).__name__ in LTX:
        return 0
    if type(vae).__name__ == trust.VIDEO_CLASS:
        return pixel_memory.FRAME_TILE if height * width > pixel_memory.FRAME_WHOLE else 0
    return TILE if max(height, width) > TILED else 0


@contextmanager
def by_size(vae: Network, pictures: int, height: int, width: int) -> Iterator[None]:
    """Let ``vae`` take pictures of this size, in px, in tiles where they are large, and one by one where they are many.

    What it was set to before holds again afterwards. An autoencoder that is set to tiles by its user keeps them; one
    that has none takes large pictures whole.
    """
    before = {name: value for name, value in vars(vae).items() if name.startswith(("tile_", "use_"))}
    try:
        if (tile := tile_of(vae, height, width)) and not getattr(vae, "use_tiling", True):
            _set_tiles(vae, tile)
        if hasattr(vae, "use_slicing") and pictures * height * width > pixel_memory.TOGETHER:
            vae.enable_slicing()
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def _set_tiles(vae: Network, side: int) -> None:
    """Tiles of ``side`` px; each class keeps them in another place. Those of AutoencoderKL overlap by a quarter."""
    factor = autoencoder_grid({"_class_name": type(vae).__name__, **vae.config})[0]
    if hasattr(vae, "tile_sample_min_size"):
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // factor
    else:
        tile, stride = tile_sizes(factor, side)
        vae.enable_tiling(tile, tile, stride, stride)
