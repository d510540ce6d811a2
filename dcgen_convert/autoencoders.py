"""Base VAE and deep-compression autoencoder behind one interface: pixels <-> model latents.

Model latents are what the transformer sees: (z - shift) * scale for FLUX-like VAEs, z * scale for SD-like VAEs and DC-AE.
B batch, C latent channels, H W px, h = H / f.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcgen_convert.errors import InputError
from dcgen_convert.files import read_json

CLASSES = ("AutoencoderDC", "AutoencoderKL")


@dataclass
class Codec:
    """An autoencoder with its latent convention.

    Attributes:
        model: the diffusers autoencoder, in eval mode (DC-AE decoders hold BatchNorm).
        factor: spatial compression f.
        channels: latent channels C.
        scale, shift: model latent = (z - shift) * scale.
    """

    model: nn.Module
    factor: int
    channels: int
    scale: float
    shift: float = 0.0

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> model latents (B, C, H/f, W/f) float32; the posterior's mean, no sampling."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        encoded = self.model.encode(pixels)
        latent = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        return (latent.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Model latents (B, C, h, w) -> (B, 3, h f, w f) in [-1, 1] float32."""
        latents = latents.to(self.model.device, torch.float32) / self.scale + self.shift
        return self.model.decode(latents.to(self.model.dtype)).sample.float().clamp(-1, 1)


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float | None = None) -> Codec:
    """Load the autoencoder in ``folder`` (config.json + safetensors).

    Raises:
        InputError: no autoencoder there, weights that contradict the config, NaN weights, or latents of another shape than the config says.
    """
    import diffusers

    config = describe(folder)
    name = config["_class_name"]
    try:
        model, info = getattr(diffusers, name).from_pretrained(
            folder, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except (ValueError, RuntimeError, OSError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"the autoencoder {folder} does not load: {first[:200]}", f"dcgen-convert inspect {folder}"
        ) from error
    problems = [*info["missing_keys"], *(str(entry) for entry in info["mismatched_keys"])]
    if problems:
        raise InputError(f"the autoencoder {folder} lacks weights that its config asks for: {', '.join(problems[:3])}")
    bad = next((key for key, value in model.named_parameters() if not torch.isfinite(value).all()), None)
    if bad:
        raise InputError(f"the autoencoder {folder} holds NaN or infinite values in {bad}", "fetch the file again")
    factor, channels = geometry(config)
    codec = Codec(
        model.eval().requires_grad_(False).to(device),
        factor,
        channels,
        scale or config["scaling_factor"],
        config.get("shift_factor") or 0.0,
    )
    shape = tuple(codec.encode(torch.zeros(1, 3, factor, factor)).shape)
    if shape != (1, channels, 1, 1):
        raise InputError(
            f"the autoencoder {folder} makes latents {shape} from {factor} px, its config says (1, {channels}, 1, 1)"
        )
    return codec


def describe(folder: Path) -> dict[str, Any]:
    """Config of the autoencoder in ``folder``; InputError when it is not one that the tool knows."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(
            f"no config.json in {folder}: not an autoencoder folder", "give a folder, a hub id or an alias with --ae"
        )
    config = read_json(path)
    if config.get("_class_name") not in CLASSES:
        raise InputError(
            f"{folder} holds a {config.get('_class_name')}, an autoencoder must be one of {', '.join(CLASSES)}"
        )
    return config


def geometry(config: dict[str, Any]) -> tuple[int, int]:
    """(f, C) from a config."""
    widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(widths) - 1), int(config["latent_channels"])
