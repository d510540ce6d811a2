"""One interface for base VAEs and deep-compression autoencoders: pixels <-> model latents.

Model latents are what the transformer sees: (z - shift) * scale for VAEs like FLUX's, z * scale for VAEs like Stable
Diffusion's and for DC-AE. Scale and shift are numbers, or tensors with a value per channel (Qwen-Image), or with a
value per channel and place in a 2 x 2 patch (FLUX.2).
B batch, C latent channels, H W px, h = H / f. A video has F frames, and T latent frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgen_convert.checkpoint import trust
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import InputError, is_out_of_memory
from dcgen_convert.core.files import read_object
from dcgen_convert.families import pixel_memory
from dcgen_convert.families.base import Network
from dcgen_convert.families.grid import LTX, autoencoder_grid, autoencoder_time
from dcgen_convert.families.pixel_memory import DECODE, ENCODE
from dcgen_convert.networks import at_once, tiles
from dcgen_convert.networks.at_once import AtOnce
from dcgen_convert.networks.folder import load_folder
from dcgen_convert.networks.wide import widen

CLASSES = (
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLQwenImage",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderKLWan",
    trust.VIDEO_CLASS,
    *LTX,
)
VIDEO = ("AutoencoderKLWan", trust.VIDEO_CLASS, *LTX)  # those that encode videos
BY_CHANNEL = ("AutoencoderKLQwenImage", "AutoencoderKLWan")  # those with statistics of each latent channel
# Scaling factors of configs that state none (diffusers 0.42; ours).
SCALES = {"AutoencoderKL": 0.18215, "AutoencoderDC": 1.0, trust.VIDEO_CLASS: 1.0, **dict.fromkeys(LTX, 1.0)}


@dataclass
class Codec:
    """An autoencoder with its latent convention.

    Attributes:
        model: the diffusers autoencoder, in eval mode (DC-AE decoders hold BatchNorm).
        factor: spatial compression f.
        channels: latent channels C.
        scale, shift: model latent = (z - shift) * scale. A number, or (C, 1, p, 1, p): a value for each place in a
            p x p patch. Of a video (C, 1, 1, p, 1, p).
        axes: of its latents (`Family.axes`): with 3 it takes videos.
        frames: whether the autoencoder's pixels and latents have a frame axis, (B, 3, 1, H, W), that the pictures here
            do not have.

    Results are on the CPU. Pictures are taken together up to `pixel_memory.TOGETHER` px and as memory holds them,
    larger ones one by one, and very large ones in tiles (`tiles.tile_of`). A video has the px of all its frames.
    """

    model: Network
    factor: int
    channels: int
    scale: float | Tensor
    shift: float | Tensor = 0.0
    axes: int = 2
    frames: bool = False
    console: Console = NULL
    _at_once: tuple[AtOnce, AtOnce] = field(init=False)

    def __post_init__(self) -> None:
        name, tell = type(self.model).__name__, self.console.warn
        self._at_once = (AtOnce(f"{name} encodes", tell), AtOnce(f"{name} decodes", tell))

    @property
    def scaling(self) -> float:
        """The scaling factor; 1 where each channel has a scale of its own, which makes its RMS 1."""
        return 1.0 if isinstance(self.scale, Tensor) else float(self.scale)

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> model latents (B, C, H/f, W/f) float32: the posterior's mean, not a sample.

        Of videos (B, 3, F, H, W) -> (B, C, T, H/f, W/f).
        """
        return self._in_parts(ENCODE, self._encode, pixels, pixels.shape[-self.axes :])

    def decode(self, latents: Tensor) -> Tensor:
        """Model latents (B, C, h, w) -> (B, 3, h f, w f) in [-1, 1] float32. Of videos as in `encode`."""
        each = [self.factor, self.factor]  # px of a latent cell, and the frames before them
        if self.axes == 3:
            each = [autoencoder_time(self._config()).frames, *each]
        shown = [count * size for count, size in zip(latents.shape[-self.axes :], each, strict=True)]
        return self._in_parts(DECODE, self._decode, latents, shown)

    def needs(self, way: int, height: int, width: int) -> int:
        """Bytes of one picture of this size, in px, beside the weights. way: ENCODE or DECODE."""
        dtype = "bf16" if self.model.dtype is torch.bfloat16 else "fp32"
        return pixel_memory.peak_bytes(self._config(), dtype, way, height, width)

    def _config(self) -> dict[str, Any]:
        return {"_class_name": type(self.model).__name__, **self.model.config}

    def _in_parts(self, way: int, work: Callable[[Tensor], Tensor], rows: Tensor, shown: Sequence[int]) -> Tensor:
        """``work`` on as many rows at once as are taken together. shown: (F, H, W) or (H, W) of the pixels of one."""
        free, (height, width) = at_once.free_bytes(self.model.device), shown[-2:]
        fits = at_once.pictures(self.needs(way, height, width), free)
        limit = min(fits, pixel_memory.together(len(rows), math.prod(shown)))
        with tiles.by_size(self.model, 1, height, width):
            return joined(self._at_once[way].parts(rows, lambda part: work(part).cpu(), limit))

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.model.device, self.model.dtype)
        encoded = self.model.encode(pixels.unsqueeze(2) if self.frames else pixels)
        latent = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        patches = self._patches(latent.squeeze(2) if self.frames else latent)
        return ((patches - self.shift) * self.scale).flatten(-2).flatten(-3, -2)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        latents = (self._patches(latents.to(self.model.device)) / self.scale + self.shift).flatten(-2).flatten(-3, -2)
        latents = latents.to(self.model.dtype)
        pixels = self.model.decode(latents.unsqueeze(2) if self.frames else latents).sample
        return (pixels.squeeze(2) if self.frames else pixels).float().clamp(-1, 1)

    def _patches(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h / p, p, w / p, p) float32, with the p of the scale."""
        p = self.scale.shape[-1] if isinstance(self.scale, Tensor) else 1
        return latents.float().unflatten(-1, (-1, p)).unflatten(-3, (-1, p))


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scale: float | None = None,
    console: Console = NULL,
) -> Codec:
    """Load the autoencoder in ``folder`` (config.json + safetensors); ``console`` is told when memory is short.

    Raises:
        InputError: there is no autoencoder, its weights do not fit its config or hold NaN, or its latents do not have
            the shape that the config says.
    """
    config = describe(folder)
    model = load_folder(folder, "autoencoder", dtype)
    bad = next((key for key, value in model.named_parameters() if not torch.isfinite(value).all()), None)
    if bad:
        raise InputError(f"the autoencoder {folder} holds NaN or infinite values in {bad}", "fetch the file again")
    factor, channels = autoencoder_grid(config)
    widen(model)
    video = config["_class_name"] in VIDEO
    codec = Codec(
        model.eval().requires_grad_(False).to(device),
        factor,
        channels,
        *normalisation(model, config, scale),
        axes=3 if video else 2,
        frames=config["_class_name"] == "AutoencoderKLQwenImage",
        console=console,
    )
    _require_shape(codec, folder, (1 + autoencoder_time(config).frames,) * video)
    return codec


def _require_shape(codec: Codec, folder: Path, frames: tuple[int, ...]) -> None:
    """InputError when the codec does not make two latent cells along each axis of 2 f px, and of ``frames`` frames."""
    side, stated = 2 * codec.factor, (1, codec.channels, *[2] * codec.axes)
    of = "".join(f"{count} frames of " for count in frames) + f"{side} px"
    try:
        shape = tuple(codec.encode(torch.zeros(1, 3, *frames, side, side)).shape)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"the autoencoder {folder} cannot encode {of}, of which its config says {stated}", "is it the right config?"
        ) from error
    if shape != stated:
        raise InputError(f"the autoencoder {folder} makes latents {shape} from {of}, its config says {stated}")


def joined(parts: Iterable[Tensor]) -> Tensor:
    """The parts one after the other; a single one is not copied."""
    every = list(parts)
    return every[0] if len(every) == 1 else torch.cat(every)


def normalisation(model: Network, config: dict[str, Any], scale: float | None) -> tuple[float | Tensor, float | Tensor]:
    """(scale, shift) of a `Codec`: each class of autoencoder keeps them in another place."""
    if config["_class_name"] in BY_CHANNEL:
        each = [1] * (5 if config["_class_name"] in VIDEO else 4)
        mean, std = (torch.tensor(config[key]).view(-1, *each) for key in ("latents_mean", "latents_std"))
        return 1 / std.to(model.device), mean.to(model.device)
    if config["_class_name"] in LTX:  # beside the weights
        mean, std = (value.float().view(-1, 1, 1, 1, 1, 1) for value in (model.latents_mean, model.latents_std))
        return 1 / std, mean
    if config["_class_name"] == "AutoencoderKLFlux2":  # statistics of 2 x 2 patches, channel first
        std = (model.bn.running_var.float() + model.config.batch_norm_eps).sqrt()
        return (1 / std).view(-1, 1, 2, 1, 2), model.bn.running_mean.float().view(-1, 1, 2, 1, 2)
    return scale or config["scaling_factor"], config.get("shift_factor") or 0.0  # `describe` fills in the class's own


def describe(folder: Path) -> dict[str, Any]:
    """Config of the autoencoder in ``folder``; InputError when the tool does not know its class.

    Configs of older versions of diffusers do not state the scaling factor: they get the one of the class.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(
            f"no config.json in {folder}: not an autoencoder folder", "give a folder, a hub id or an alias with --ae"
        )
    config = read_object(path)
    if config.get("_class_name") == trust.ADAPTER_CLASS:
        config["_class_name"] = "AutoencoderDC"  # the same tensors; it only shows its latents in another shape
    if config.get("_class_name") not in CLASSES:
        raise InputError(
            f"{folder} holds a {config.get('_class_name')}, an autoencoder must be one of {', '.join(CLASSES)}"
        )
    if config["_class_name"] in LTX:
        _require_plain(folder, config)
    scale = SCALES.get(config["_class_name"])
    return config if scale is None else {"scaling_factor": scale, **config}


def _require_plain(folder: Path, config: dict[str, Any]) -> None:
    """InputError for an autoencoder of LTX's kind with more to it than pipelines of Wan ask of one."""
    noise = config.get("decoder_inject_noise") or False
    others = {
        "a scaling factor beside the statistics of its channels": config.get("scaling_factor", 1.0) != 1.0,
        "a decoder that is given a timestep": bool(config.get("timestep_conditioning")),
        "a decoder that adds noise": any(noise) if isinstance(noise, list) else bool(noise),
    }
    if found := next((name for name, is_there in others.items() if is_there), None):
        raise InputError(
            f"the autoencoder {folder} has {found}, of which pipelines of Wan know nothing",
            "give LTX-2's, or one of its kind without",
        )
