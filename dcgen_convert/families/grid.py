"""One latent space as a transformer sees it: factor, channels, patch, and the tokens of a picture.

f is the spatial compression of an autoencoder, c its latent channels, p the patch in latent cells.
A picture with a side of s px has (s / (f p))^2 tokens, a video so many in each latent frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from dcgen_convert.core.errors import RecipeError

LTX = ("AutoencoderKLLTX2Video", "AutoencoderLTX2ForWan")  # the class of diffusers, and what a bundle has of it
MOST = 1 << 16  # largest factor, channels or patch that is accepted: a larger number means a damaged file


@dataclass(frozen=True)
class Time:
    """How an autoencoder makes latent frames of the frames of a video.

    Attributes:
        frames: of the video per latent frame.
        alone: whether the first latent frame is of the first frame alone: 1 + n T' frames make 1 + T' latent frames.
            Else n T frames make T.
    """

    frames: int = 1
    alone: bool = False

    def latents(self, frames: int) -> int:
        """Latent frames of so many frames; those that make no whole one count as one."""
        return 1 + -(-(frames - 1) // self.frames) if self.alone else -(-frames // self.frames)

    def shown(self, frames: int) -> int:
        """Of so many frames the first ones that pipelines draw: 1 + n (T - 1) of T latent frames.

        An autoencoder with a first frame alone gives back all of whole latent frames. Of one without, n - 1 are left
        out at the end.
        """
        return 1 + self.frames * (self.latents(frames) - 1)

    def whole(self, frames: int) -> int:
        """The smallest number of frames, not below this one, that makes whole latent frames."""
        return self.shown(frames) if self.alone else self.frames * self.latents(frames)

    def meets(self, base: Time) -> bool:
        """Whether each latent frame is of the same frames as one or several whole latent frames of the ``base``.

        The base is given `shown` frames. Where both have as many, the k-th meets the k-th.
        """
        several, rest = divmod(self.frames, base.frames)
        return rest == 0 and (several == 1 or (self.alone and base.alone))

    @property
    def told(self) -> str:
        """For messages: what makes a latent frame."""
        return f"{self.frames} frames make one latent frame" + ", after a first one of one frame" * self.alone


STILL = Time()  # of pictures


@dataclass(frozen=True)
class Grid:
    """One latent space. f: px per latent cell side; c: channels; p: cells per token side; time: of a video."""

    f: int
    c: int
    p: int
    time: Time = STILL

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


def autoencoder_time(config: Mapping[str, Any]) -> Time:
    """The `Time` of an autoencoder with this config.

    Raises:
        RecipeError: the config does not say it.
    """
    kind = config.get("_class_name")
    if kind == "AutoencoderDCVideo":
        return Time(4)
    if kind == "AutoencoderKLWan":
        return Time(2 ** sum(map(bool, config.get("temperal_downsample") or (False, True, True))), alone=True)
    if kind in LTX:
        frames = config.get("temporal_compression_ratio")
        if not (_sensible(frames) and _sensible(config.get("spatial_compression_ratio"))):
            raise RecipeError(
                f"autoencoder config ({kind}) lacks temporal_compression_ratio or spatial_compression_ratio",
                "take the config.json that was published with its weights",
            )
        return Time(frames, alone=True)
    return STILL


def _sensible(number: Any) -> TypeGuard[int]:
    return type(number) is int and 0 < number <= MOST


def tile_sizes(factor: int, tile: int = 1024) -> tuple[int, int]:
    """(side, stride) in px of the tiles of an autoencoder with this factor: whole latent cells, at least 8 a side.

    The stride is 7/8 of the tile. The tiles of diffusers (512, stride 448) overlap by one cell at f64, and at f128
    their stride is 3.5 cells, so that they would be put together wrongly.
    """
    cells = max(8, tile // factor)
    return cells * factor, cells * 7 // 8 * factor
