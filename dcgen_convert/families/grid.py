"""One latent space as a transformer sees it: factor, channels, patch, and the tokens of a picture.

Legend: f spatial compression of an autoencoder, c its latent channels, p patch in latent cells, side in px, tokens =
(side / (f p))^2.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcgen_convert.core.errors import RecipeError

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

    def tokens(self, height: int, width: int | None = None) -> int:
        """Tokens of a picture; of a square one without ``width``."""
        return (height // self.token_px) * ((width or height) // self.token_px)


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


def tile_sizes(factor: int) -> tuple[int, int]:
    """(side, stride) in px of tiles that an AutoencoderDC of that factor can be cut into: diffusers' own where they
    fit.

    The stock stride of 448 px is 3.5 latent cells at f128, so that tiles would be put together wrongly.
    """
    return (512, 448) if 448 % factor == 0 else (8 * factor, 7 * factor)
