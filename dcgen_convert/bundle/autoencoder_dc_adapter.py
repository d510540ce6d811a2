# SPDX-License-Identifier: Apache-2.0
"""AutoencoderDC behind the interface of a shallow VAE, so that a stock "pack p x p" pipeline runs a patch-1 model.

A pipeline such as FluxPipeline samples a latent of c/p^2 channels on a grid p times finer than the deep latent and
packs p x p pixels of it into one token. This class exposes the deep latent (B, c, h, w) as exactly that picture:

    encode: deep (B, c, h, w)  ->  pixel shuffle  ->  exposed (B, c/p^2, p h, p w)
    decode: exposed            ->  pixel unshuffle ->  deep   ->  image

The pipeline's packing undoes the shuffle, so a token holds the c channels of one deep pixel, unchanged and in order.

Legend: B batch, c latent channels, h w deep latent grid, f compression of the autoencoder, p pack factor of the
pipeline.

The file is copied into a bundle's vae/ folder and loaded from there by diffusers: it imports torch and diffusers only.
Loaded from a bundle it lands in one shared module cache under its file name; the version in the name keeps two bundles
with different adapters apart. When you change its code, change MODULE_NAME too.
"""

import functools
import inspect
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput

MODULE_NAME = "autoencoder_dc_adapter_v4"
CLASS_NAME = "AutoencoderDCAdapter"
ORDERS = ("c_first", "c_last")


def expose(deep: torch.Tensor, pack: int, order: str) -> torch.Tensor:
    """Spread deep channels over a finer grid: (B, c, h, w) -> (B, c/p^2, p h, p w).

    `order` is the order in which the pipeline reads a patch: "c_first" (c, ph, pw) as FLUX does, "c_last" (ph, pw, c).
    """
    if order == "c_first":
        return F.pixel_shuffle(deep, pack)
    batch, channels, height, width = deep.shape
    grid = deep.reshape(batch, pack, pack, channels // pack**2, height, width)  # (B, ph, pw, c/p^2, h, w)
    return grid.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels // pack**2, height * pack, width * pack)


def collect(exposed: torch.Tensor, pack: int, order: str) -> torch.Tensor:
    """Undo `expose`: (B, c/p^2, p h, p w) -> (B, c, h, w)."""
    if order == "c_first":
        return F.pixel_unshuffle(exposed, pack)
    batch, channels, height, width = exposed.shape
    grid = exposed.reshape(batch, channels, height // pack, pack, width // pack, pack)  # (B, c/p^2, h, ph, w, pw)
    return grid.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * pack**2, height // pack, width // pack)


class PointDistribution:
    """The "posterior" of a deterministic encoder: every sample is its mode."""

    def __init__(self, latents: torch.Tensor):
        self.latents = latents

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """The latents; `generator` is accepted because pipelines pass one."""
        return self.latents

    def mode(self) -> torch.Tensor:
        """The latents."""
        return self.latents


@dataclass
class AdapterOutput(EncoderOutput):
    """Exposed latents (B, c/p^2, p h, p w) under the three names that pipelines ask for: latent, latents,
    latent_dist.
    """

    @property
    def latents(self) -> torch.Tensor:
        return self.latent

    @property
    def latent_dist(self) -> PointDistribution:
        return PointDistribution(self.latent)


class AutoencoderDCAdapter(AutoencoderDC):
    """AutoencoderDC (same state-dict keys, same arguments) with a shallow VAE's latent geometry.

    Args, beside AutoencoderDC's own (all by keyword):
        latent_pack: p, the patch that the pipeline packs into a token.
        latent_order: "c_first" or "c_last", the order of a packed token.
        shift_factor: read by pipelines from the config; DC-AE latents have a scale and no shift.
        block_out_channels: derived, whatever is passed. Pipelines compute their VAE factor as
            2 ** (len(block_out_channels) - 1); here that is f / p.
        latent_frames: whether the pipeline's latents and pictures have a frame axis of one, (B, c/p^2, 1, p h, p w),
            and are normalised by latents_mean and latents_std instead of scaling_factor (Qwen-Image).
        latent_batch_norm: whether the pipeline normalises packed latents by the statistics of `bn` (FLUX.2).
        z_dim, latents_mean, latents_std, batch_norm_eps: derived for these two, whatever is passed.
        auto_map: derived, whatever is passed. `AutoModel` finds this class through it.

    Raises ValueError for an order that does not exist and channels or a factor that p does not divide.
    """

    # The name that save_pretrained writes into model_index.json, and the file that it then looks for.
    __module__ = MODULE_NAME

    def __init__(
        self,
        *args,
        latent_pack: int = 2,
        latent_order: str = "c_first",
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] | None = None,
        latent_frames: bool = False,
        latent_batch_norm: bool = False,
        z_dim: int | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        batch_norm_eps: float | None = None,
        auto_map: dict[str, str] | None = None,
        **stock,
    ):
        super().__init__(*args, **stock)
        levels = len(self.config.encoder_block_out_channels) - math.log2(latent_pack)
        if latent_order not in ORDERS:
            raise ValueError(f"latent_order is {latent_order!r}; it must be one of {ORDERS}")
        if self.config.latent_channels % latent_pack**2 or levels < 1 or levels != int(levels):
            raise ValueError(
                f"latent_pack {latent_pack} does not divide an autoencoder with {self.config.latent_channels} channels "
                f"and factor {self.spatial_compression_ratio}"
            )
        self.register_to_config(
            latent_pack=latent_pack,
            latent_order=latent_order,
            shift_factor=shift_factor,
            block_out_channels=tuple(self.config.encoder_block_out_channels)[: int(levels)],
        )
        self.register_to_config(latent_frames=latent_frames, latent_batch_norm=latent_batch_norm)
        self.register_to_config(auto_map={"AutoModel": f"{MODULE_NAME}.{CLASS_NAME}"})
        exposed, std = self.config.latent_channels // latent_pack**2, 1 / self.config.scaling_factor
        if latent_frames:
            self.temperal_downsample = (False,) * (int(levels) - 1)  # pipelines take 2 ** its length as their factor
            self.register_to_config(z_dim=exposed, latents_mean=[0.0] * exposed, latents_std=[std] * exposed)
        if latent_batch_norm:
            # Not a module: the statistics follow from the config, and must not be rounded to the weights' dtype.
            channels = self.config.latent_channels
            self.bn = SimpleNamespace(running_mean=torch.zeros(channels), running_var=torch.full((channels,), std**2))
            self.register_to_config(batch_norm_eps=0.0)
        if self.tile_sample_stride_height % self.spatial_compression_ratio:
            # The stock tiles (512, stride 448) break f128: 448 is not a multiple of it. These fit every f up to 128.
            self.enable_tiling(1024, 1024, 896, 896)
            self.disable_tiling()

    # diffusers reads the accepted config keys from this signature.
    _stock = inspect.signature(AutoencoderDC.__init__)
    _own = [p for p in inspect.signature(__init__).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    __init__.__signature__ = _stock.replace(parameters=[*_stock.parameters.values(), *_own])

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AdapterOutput | tuple[torch.Tensor]:
        """Encode images (B, 3, f h, f w) into exposed latents (B, c/p^2, p h, p w), unscaled; a frame axis is kept.

        Pipelines that edit pictures give sides that are multiples of 32 px, and count the cells of f that are whole.
        An image with a part of a cell is resized to these.
        """
        pixels, f = x[:, :, 0] if x.ndim == 5 else x, self.spatial_compression_ratio
        whole = tuple(max(f, side // f * f) for side in pixels.shape[-2:])
        if whole != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size=whole, mode="bilinear", antialias=True)
        (deep,) = super().encode(pixels, return_dict=False)
        exposed = expose(deep, self.config.latent_pack, self.config.latent_order)
        exposed = exposed.unsqueeze(2) if x.ndim == 5 else exposed
        return AdapterOutput(latent=exposed) if return_dict else (exposed,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode exposed latents (B, c/p^2, p h, p w), or deep ones (B, c, h, w), into images (B, 3, f h, f w).

        Which of the two it is follows from the channel count; any other count is a ValueError. A frame axis is kept.
        """
        if z.ndim == 5:
            (frame,) = self.decode(z[:, :, 0], return_dict=False)
            return DecoderOutput(sample=frame.unsqueeze(2)) if return_dict else (frame.unsqueeze(2),)
        deep_channels, pack = self.config.latent_channels, self.config.latent_pack
        if z.shape[1] == deep_channels // pack**2:
            z = collect(z, pack, self.config.latent_order)
        elif z.shape[1] != deep_channels:
            raise ValueError(
                f"decode got {z.shape[1]} latent channels; "
                f"it takes {deep_channels // pack**2} (packed by {pack} x {pack}) or {deep_channels}"
            )
        return super().decode(z, return_dict=return_dict)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: float | None = None,
        tile_sample_stride_width: float | None = None,
    ) -> None:
        """As in diffusers, all in px. A tile becomes a multiple of f, and at least 2 f. A stride that is not given, or
        not smaller than the tile, becomes 7/8 of it, as those of diffusers are: strides that are larger would leave
        out a part of the picture.
        """
        f = self.spatial_compression_ratio
        asked = {
            "height": (tile_sample_min_height, tile_sample_stride_height),
            "width": (tile_sample_min_width, tile_sample_stride_width),
        }
        for axis, sizes in asked.items():
            tile = max(2 * f, int(sizes[0] or getattr(self, f"tile_sample_min_{axis}")) // f * f)
            stride = int(sizes[1] or getattr(self, f"tile_sample_stride_{axis}")) // f * f
            if not 0 < stride < tile:
                stride = max(f, tile * 7 // 8 // f * f)
            setattr(self, f"tile_sample_min_{axis}", tile)
            setattr(self, f"tile_sample_stride_{axis}", stride)
            setattr(self, f"tile_latent_min_{axis}", tile // f)
        self.use_tiling = True

    @functools.wraps(AutoencoderDC.save_pretrained)
    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in diffusers, and this file with it: without it the saved folder could not be loaded again."""
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, f"{MODULE_NAME}.py").write_text(
            Path(__file__).read_text(encoding="utf-8"), encoding="utf-8"
        )


def _first(kind: type) -> type:
    """`kind`, or the class that an earlier run of this very file has made: diffusers runs the file at each load.

    Pickle, and a pipeline that is given an autoencoder, look for the class in the module of this name. ModelMixin is
    there too, because a pipeline compares the class with it.
    """
    code = Path(__file__).read_bytes()
    module = sys.modules.get(MODULE_NAME)
    if module is None or vars(module).get("code") != code:
        module = sys.modules[MODULE_NAME] = ModuleType(MODULE_NAME)
        vars(module).update({CLASS_NAME: kind, "ModelMixin": ModelMixin, "code": code})
    return vars(module)[CLASS_NAME]


AutoencoderDCAdapter = _first(AutoencoderDCAdapter)
