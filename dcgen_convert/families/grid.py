"""One latent space as a transformer sees it: factor, channels, patch, and the tokens of a picture.

f is the spatial compression of an autoencoder, c its latent channels, p the patch in latent cells.
A picture with a side of s px has (s / (f p))^2 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from dcgen_convert.core.errors import RecipeError

MOST = 1 << 16  # largest factor, channels or patch that is accepted: a larger number means a damaged file


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

    def tokens(self, height: int, width: int | None = None) -> int:
        """Tokens of a picture, sides in px. Without ``width`` the picture is a square."""
        return (height // self.token_px) * ((width or height) // self.token_px)


def autoencoder_grid(config: Mapping[str, Any]) -> tuple[int, int]:
    """(f, c) from the config of an autoencoder of any class.

    Raises:
        RecipeError: the config does not say them.
    """
    levels = config.get("dim_mult") or config.get("encoder_block_out_channels") or config.get("block_out_channels")
    factor = config.get("spatial_compression_ratio")
    if factor is None and isinstance(levels, (list, tuple)) and len(levels) <= 16:
        patch = config.get("patch_size")  # of Wan 2.2's, which folds 2 x 2 px first
        factor = 2 ** (len(levels) - 1) * (patch if isinstance(patch, int) else 1)
    channels = config.get("z_dim" if "dim_mult" in config else "latent_channels")
    if not (_sensible(factor) and _sensible(channels)):
        raise RecipeError(
            f"autoencoder config ({config.get('_class_name', 'no class')}) lacks block_out_channels or latent_channels",
            "use an AutoencoderDC or AutoencoderKL folder",
        )
    return factor, channels


def _sensible(number: Any) -> TypeGuard[int]:
    return type(number) is int and 0 < number <= MOST


def tile_sizes(factor: int, tile: int = 1024) -> tuple[int, int]:
    """(side, stride) in px of the tiles of an autoencoder with this factor: whole latent cells, at least 8 a side.

    The stride is 7/8 of the tile. The tiles of diffusers (512, stride 448) overlap by one cell at f64, and at f128
    their stride is 3.5 cells, so that they would be put together wrongly.
    """
    cells = max(8, tile // factor)
    return cells * factor, cells * 7 // 8 * factor
