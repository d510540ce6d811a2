# SPDX-License-Identifier: Apache-2.0
"""AutoencoderDCVideo: the deep-compression autoencoder for videos (DC-AE-V), with the interface of Wan's VAE.

Latents have one frame for four frames of the video. Frames are worked on in chunks of K. Inside a chunk a convolution
sees the frame before and the frame after; across chunks it sees the past only. So a video is encoded and decoded chunk
by chunk, and one frame per convolution is kept between two chunks.

    video (B, 3, 4 T, f h, f w)  <->  latents (B, c, T, h, w)

A stock WanPipeline asks for (n - 1) // 4 + 1 latent frames of n frames, and Wan's VAE gives 4 T - 3 frames of T.
Therefore `encode` repeats the last frame until the frames are a multiple of 4, and `decode` leaves the last 3 out. A
picture is a video of one frame. A pipeline that draws from a picture encodes the picture and grey frames after it: with
`first_alone` the first frame is repeated instead, so that the first latent frame is of the picture alone.

Large frames need less memory in tiles (`enable_tiling`): each tile is taken through all frames, and where tiles overlap
each counts less the nearer its edge is.

It is a subclass of Wan's class, because a stock SanaVideoPipeline asks for the class, and nothing else is Wan's.

Legend: B batch, C channels, T frames, H W px or cells, K frames per chunk, c latent channels, f spatial compression.

Sources: arXiv 2509.25182 (DC-VideoGen) and the layout that its authors published. The names of the tensors are ours.

The file is copied into a bundle's vae/ folder and loaded from there by diffusers: it imports torch and diffusers only.
Loaded from a bundle it lands in one shared module cache under its file name; the version in the name keeps two bundles
with different code apart. When you change its code, change MODULE_NAME too.
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, IdentityDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

MODULE_NAME = "autoencoder_dc_video_v4"
CLASS_NAME = "AutoencoderDCVideo"
TIME = 4  # frames of a video per latent frame
TILE, STRIDE = 512, 448  # px of a tile's side, and from one tile to the next at most

Kept = dict[nn.Module, Tensor]  # convolution -> the last frame (B, C, 1, H, W) of the chunk before


def fold(x: Tensor, time: int, space: int) -> Tensor:
    """Blocks of time x space x space into channels, in the order (c, t, h, w): the 3-D form of pixel_unshuffle."""
    blocks = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))  # (B, C, T, t, H, h, W, w)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def unfold(x: Tensor, time: int, space: int) -> Tensor:
    """Undo `fold`."""
    blocks = x.unflatten(1, (-1, time, space, space))  # (B, C, t, h, w, T, H, W)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class ChunkConv(nn.Conv3d):
    """3 x 3 x 3 convolution over chunks of `chunk` frames.

    Before a chunk stands the last frame of the chunk before it, zeros at the start; after it stand zeros. Frames that
    are no multiple of `chunk` have zeros at both ends and are one piece, as the authors trained.

    causal False: zeros on both sides of every chunk.
    """

    def __init__(self, inner: int, outer: int, chunk: int, *, bias: bool = True, causal: bool = True):
        super().__init__(inner, outer, 3, padding=(0, 1, 1), bias=bias)
        self.chunk, self.causal = chunk, causal

    def forward(self, x: Tensor, kept: Kept) -> Tensor:
        """(B, C, T, H, W) -> (B, outer, T, H, W). `kept` is read and renewed where the frames are whole chunks."""
        if x.shape[2] % self.chunk:
            return super().forward(F.pad(x, (0, 0, 0, 0, 1, 1)))
        results, nothing = [], torch.zeros_like(x[:, :, :1])
        before = kept.get(self, nothing)
        for chunk in x.split(self.chunk, dim=2):
            results.append(super().forward(torch.cat([before, chunk, nothing], dim=2)))
            before = chunk[:, :, -1:] if self.causal else nothing
        kept[self] = before.clone()  # a view would keep the whole chunk
        return results[0] if len(results) == 1 else torch.cat(results, dim=2)


class ChannelNorm(nn.Module):
    """RMSNorm over channels, with weight and bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W), of which every cell is divided by its root mean square."""
        square = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = (square.square() / x.shape[1] + 1e-5).rsqrt().to(x.dtype)
        return x * scale * self.weight[:, None, None, None] + self.bias[:, None, None, None]


class ResBlock(nn.Module):
    """x + norm(conv2(silu(conv1(x))))."""

    def __init__(self, channels: int, chunk: int):
        super().__init__()
        self.conv1 = ChunkConv(channels, channels, chunk)
        self.conv2 = ChunkConv(channels, channels, chunk, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor, kept: Kept) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        return x + self.norm(self.conv2(F.silu(self.conv1(x, kept)), kept))


class Down(nn.Module):
    """Fewer cells: a convolution, folded. Beside it the input, folded, as means over groups of channels."""

    def __init__(self, inner: int, outer: int, chunk: int, *, time: int = 1, space: int = 1, shortcut: bool = True):
        super().__init__()
        self.time, self.space, self.outer, self.shortcut = time, space, outer, shortcut
        self.conv = ChunkConv(inner, outer // (time * space**2), chunk)

    def forward(self, x: Tensor, kept: Kept) -> Tensor:
        """(B, C, T, H, W) -> (B, outer, T / time, H / space, W / space)."""
        y = fold(self.conv(x, kept), self.time, self.space)
        if self.shortcut:
            y = y + fold(x, self.time, self.space).unflatten(1, (self.outer, -1)).mean(dim=2)
        return y


class Up(nn.Module):
    """More cells: a convolution, unfolded. Beside it the input with its channels repeated, unfolded."""

    def __init__(
        self,
        inner: int,
        outer: int,
        chunk: int,
        *,
        time: int = 1,
        space: int = 1,
        shortcut: bool = True,
        causal: bool = True,
    ):
        super().__init__()
        self.time, self.space, self.shortcut = time, space, shortcut
        self.conv = ChunkConv(inner, outer * time * space**2, chunk, causal=causal)

    def forward(self, x: Tensor, kept: Kept) -> Tensor:
        """(B, C, T, H, W) -> (B, outer, T time, H space, W space)."""
        wide = self.conv(x, kept)
        if self.shortcut:
            wide = wide + x.repeat_interleave(wide.shape[1] // x.shape[1], dim=1)
        return unfold(wide, self.time, self.space)


class Encoder(nn.Module):
    """Frames (B, 3, T, H, W) -> latents (B, c, T / 4, H / f, W / f); T is a multiple of 4."""

    def __init__(self, colours: int, latent: int, widths: tuple[int, ...], layers: tuple[int, ...], chunk: int):
        super().__init__()
        self.conv_in = Down(colours, widths[0], chunk, space=2, shortcut=False)
        self.stages, last = nn.ModuleList(), len(widths) - 1
        for i, (width, depth) in enumerate(zip(widths, layers, strict=True)):
            stage = [ResBlock(width, chunk // TIME if i == last else chunk) for _ in range(depth)]
            if i < last:
                step = {"time": TIME} if i == last - 1 else {"space": 2}
                stage.append(Down(width, widths[i + 1], chunk, **step))
            self.stages.append(nn.ModuleList(stage))
        self.conv_out = ChunkConv(widths[-1], latent, chunk // TIME)

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        """`kept`: what the chunk before has left, and what this one leaves."""
        kept = {} if kept is None else kept
        x = self.conv_in(x, kept)
        for stage in self.stages:
            for block in stage:
                x = block(x, kept)
        return self.conv_out(x, kept)


class Decoder(nn.Module):
    """Latents (B, c, T, h, w) -> frames (B, 3, 4 T, f h, f w). The stages are numbered as those of the encoder."""

    def __init__(
        self,
        colours: int,
        latent: int,
        widths: tuple[int, ...],
        layers: tuple[int, ...],
        chunk: int,
        causal_time: bool,
    ):
        super().__init__()
        self.conv_in = ChunkConv(latent, widths[-1], chunk // TIME)
        self.stages, last = nn.ModuleList(), len(widths) - 1
        for i, (width, depth) in enumerate(zip(widths, layers, strict=True)):
            blocks: list[nn.Module] = [ResBlock(width, chunk // TIME if i == last else chunk) for _ in range(depth)]
            if i == last - 1:
                blocks.insert(0, Up(widths[-1], width, chunk // TIME, time=TIME, causal=causal_time))
            elif i < last:
                blocks.insert(0, Up(widths[i + 1], width, chunk, space=2))
            self.stages.append(nn.ModuleList(blocks))
        self.norm_out = ChannelNorm(widths[0])
        self.conv_out = Up(widths[0], colours, chunk, space=2, shortcut=False)

    def forward(self, z: Tensor, kept: Kept | None = None) -> Tensor:
        """`kept`: what the chunk before has left, and what this one leaves."""
        kept = {} if kept is None else kept
        z = self.conv_in(z, kept)
        for stage in reversed(self.stages):
            for block in stage:
                z = block(z, kept)
        return self.conv_out(F.silu(self.norm_out(z)), kept)


def tile_spans(side: int, tile: int, overlap: int) -> list[range]:
    """The cells of the tiles along a side: as few tiles as do, of one size, up to `tile`, that overlap by `overlap` or
    more.
    """
    if side <= tile:
        return [range(side)]
    count = -(-(side - overlap) // (tile - overlap))
    size = -(-(side + (count - 1) * overlap) // count)
    starts = (round(place * (side - size) / (count - 1)) for place in range(count))
    return [range(start, start + size) for start in starts]


def tile_shares(span: range, side: int, overlap: int, scale: int) -> Tensor:
    """How much each number of a tile counts, (len(span) scale,): it rises to 1 over the overlap, on inner edges."""
    place = torch.arange(len(span) * scale) + 0.5
    rising = (place / (overlap * scale)).clamp(max=1)
    ones = torch.ones_like(place)
    return (rising if span.start else ones) * (rising.flip(0) if span.stop < side else ones)


class AutoencoderDCVideo(AutoencoderKLWan):
    """DC-AE-V. The defaults are those of f32t4c32.

    Args:
        block_out_channels: channels of each stage, the one with the most cells first. f is 2 to the power of their
            number less 1: the first convolution halves the frames, each stage but the last two does so once more, and
            between the last two stages four frames become one.
        layers_per_block: residual blocks of each stage.
        chunk_frames: K, a multiple of 4.
        causal_time: whether the decoder's convolution that makes four frames of one sees the chunk before. It does not
            in the authors' f64.
        scaling_factor: model latent = scaling_factor * latent; there is no shift.
        first_alone: whether `encode` repeats the first frame, and not the last, where frames are missing.
        z_dim, latents_mean, latents_std, scale_factor_temporal, scale_factor_spatial, spatial_compression_ratio:
            derived, whatever is passed. Pipelines read them.
        auto_map: derived, whatever is passed. `AutoModel` finds this class through it.

    Raises ValueError for a K that is no multiple of 4, widths that a stage cannot split, and stages without a count.
    """

    # The name that save_pretrained writes into model_index.json, and the file that it then looks for.
    __module__ = MODULE_NAME
    _group_offload_block_modules: ClassVar[list[str]] = ["encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (256, 512, 512, 1024, 1024, 1024),
        layers_per_block: tuple[int, ...] = (5, 10, 4, 4, 4, 4),
        chunk_frames: int = 40,
        causal_time: bool = True,
        scaling_factor: float = 1.0,
        first_alone: bool = False,
        z_dim: int | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scale_factor_temporal: int | None = None,
        scale_factor_spatial: int | None = None,
        spatial_compression_ratio: int | None = None,
        auto_map: dict[str, str] | None = None,
    ):
        super(AutoencoderKLWan, self).__init__()  # without Wan's networks
        widths, layers = tuple(block_out_channels), tuple(layers_per_block)
        if chunk_frames < TIME or chunk_frames % TIME:
            raise ValueError(f"chunk_frames is {chunk_frames}; it must be a multiple of {TIME}")
        if len(widths) < 2 or len(widths) != len(layers) or any(width % 4 for width in widths):
            raise ValueError(f"block_out_channels {widths} and layers_per_block {layers} do not make stages")
        self.encoder = Encoder(in_channels, latent_channels, widths, layers, chunk_frames)
        self.decoder = Decoder(in_channels, latent_channels, widths, layers, chunk_frames, causal_time)
        factor = 2 ** (len(widths) - 1)
        self.use_tiling = False
        self.tile_sample_min_height = self.tile_sample_min_width = TILE
        self.tile_sample_stride_height = self.tile_sample_stride_width = STRIDE
        self.register_to_config(
            z_dim=latent_channels,
            latents_mean=[0.0] * latent_channels,
            latents_std=[1 / scaling_factor] * latent_channels,
            scale_factor_temporal=TIME,
            scale_factor_spatial=factor,
            spatial_compression_ratio=factor,
            auto_map={"AutoModel": f"{MODULE_NAME}.{CLASS_NAME}"},
        )

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Take frames that are larger than a tile in tiles, sides in px; None: as before, at first 512 and 448."""
        self.use_tiling = True
        self.tile_sample_min_height = tile_sample_min_height or self.tile_sample_min_height
        self.tile_sample_min_width = tile_sample_min_width or self.tile_sample_min_width
        self.tile_sample_stride_height = tile_sample_stride_height or self.tile_sample_stride_height
        self.tile_sample_stride_width = tile_sample_stride_width or self.tile_sample_stride_width

    def disable_tiling(self) -> None:
        """Take frames whole."""
        self.use_tiling = False

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[IdentityDistribution]:
        """Encode videos (B, 3, n, f h, f w) in [-1, 1] into latents (B, c, ceil(n / 4), h, w), unscaled.

        Raises ValueError for other sides, and for pictures without a frame axis.
        """
        factor = self.config.scale_factor_spatial
        if x.ndim != 5 or x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(
                f"encode got {tuple(x.shape)}; it takes (B, {self.config.in_channels}, frames, height, width) with "
                f"sides that are multiples of {factor} px"
            )
        missing = -x.shape[2] % TIME
        if self.config.first_alone:
            x = torch.cat([x[:, :, :1].expand(-1, -1, missing, -1, -1), x], dim=2)
        else:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        latents = IdentityDistribution(self._over(self.encoder, x, self.config.chunk_frames, factor, 1))
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, c, T, h, w), unscaled, into videos (B, 3, 4 T - 3, f h, f w)."""
        frames = self._over(self.decoder, z, self.config.chunk_frames // TIME, 1, self.config.scale_factor_spatial)
        frames = frames[:, :, : frames.shape[2] - (TIME - 1)]
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode what `sample` is encoded into."""
        (latents,) = self.encode(sample, return_dict=False)
        return self.decode(latents.mode(), return_dict=return_dict)

    def _over(self, part: nn.Module, x: Tensor, length: int, inner: int, outer: int) -> Tensor:
        """`part` of all of x, chunk by chunk; in tiles where they are enabled and the frames are larger than one.

        inner, outer: numbers per side of a latent cell in x and in the result.
        """
        factor, height, width = self.config.scale_factor_spatial, x.shape[-2] // inner, x.shape[-1] // inner
        tall, wide = (max(2, side // factor) for side in (self.tile_sample_min_height, self.tile_sample_min_width))
        strides = self.tile_sample_stride_height // factor, self.tile_sample_stride_width // factor
        over, beside = (min(max(1, t - s), t - 1) for t, s in zip((tall, wide), strides, strict=True))
        if not self.use_tiling or (height <= tall and width <= wide):
            return torch.cat([*self._chunks(part, x, length)], dim=2)
        total = counted = None
        for rows in tile_spans(height, tall, over):
            for columns in tile_spans(width, wide, beside):
                cut = x[..., rows.start * inner : rows.stop * inner, columns.start * inner : columns.stop * inner]
                found = torch.cat([*self._chunks(part, cut, length)], dim=2)
                down = tile_shares(rows, height, over, outer).to(found.device)
                share = down[:, None] * tile_shares(columns, width, beside, outer).to(found.device)
                if total is None or counted is None:
                    exact = torch.promote_types(found.dtype, torch.float32)
                    total = found.new_zeros(*found.shape[:3], height * outer, width * outer, dtype=exact)
                    counted = total.new_zeros(total.shape[-2:])
                place = (
                    ...,
                    slice(rows.start * outer, rows.stop * outer),
                    slice(columns.start * outer, columns.stop * outer),
                )
                total[place] += found * share
                counted[place] += share
        return total.div_(counted).to(x.dtype)

    @staticmethod
    def _chunks(part: nn.Module, x: Tensor, length: int) -> Iterator[Tensor]:
        """`part` of every `length` frames of x. A rest of fewer frames stands for itself, as in the authors' code."""
        kept: Kept = {}
        for chunk in x.split(length, dim=2):
            yield part(chunk, kept)

    @functools.wraps(ModelMixin.save_pretrained)
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


AutoencoderDCVideo = _first(AutoencoderDCVideo)
