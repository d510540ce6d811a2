"""The DC-AE of an export, between ComfyUI's pictures (B, H, W, 3) in [0, 1] and its latents (B, c, H/f, W/f).

The network is AutoencoderDC of diffusers. Latents are unscaled, as ComfyUI keeps them between nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

TILES = ("auto", "always", "never")


class DeepAutoencoder(torch.nn.Module):
    """A DC-AE. facts: from `facts.facts_of`. weights: the tensors of its file.

    A module around the one of diffusers: ComfyUI sets `device` on what it moves, which diffusers does not allow.
    """

    def __init__(self, facts: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
        from diffusers import AutoencoderDC

        super().__init__()
        self.latent: dict[str, Any] = facts["latent"]
        self.network = AutoencoderDC.from_config(facts["config"])
        self.network.load_state_dict(weights, assign=True)
        self.network.requires_grad_(False).eval()

    def side(self, height: int, width: int, tiles: str) -> int | None:
        """Side in px of the tiles in which a picture is taken; None: it is taken as a whole."""
        chosen = self.latent["tiles"]
        whole = tiles == "never" or (tiles == "auto" and max(height, width) <= chosen["above"])
        return None if whole else chosen["side"]

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, tiles: str = "auto") -> torch.Tensor:
        """(B, H, W, 3) -> (B, c, H/f, W/f) float32. What is left of whole cells at the edges is cut off evenly."""
        factor = self.latent["factor"]
        height, width = (size // factor * factor for size in pixels.shape[1:3])
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        inside = pixels[:, top : top + height, left : left + width, :3].movedim(-1, 1)
        self._set_tiles(height, width, tiles)
        found = [self.network.encode(2 * self._like(one) - 1, return_dict=False)[0].float() for one in inside.split(1)]
        return torch.cat(found)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, tiles: str = "auto") -> torch.Tensor:
        """(B, c, h, w) -> (B, f h, f w, 3) float32."""
        channels, factor = self.latent["channels"], self.latent["factor"]
        if latents.shape[1] != channels:
            raise ValueError(f"the latent has {latents.shape[1]} channels, this DC-AE decodes {channels}")
        self._set_tiles(latents.shape[2] * factor, latents.shape[3] * factor, tiles)
        found = [self.network.decode(self._like(one), return_dict=False)[0].float() for one in latents.split(1)]
        return (torch.cat(found) / 2 + 0.5).clamp(0, 1).movedim(1, -1)

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        parameter = next(self.network.parameters())
        return tensor.to(parameter.device, parameter.dtype)

    def _set_tiles(self, height: int, width: int, tiles: str) -> None:
        side, stride = self.side(height, width, tiles), self.latent["tiles"]["stride"]
        if side is None:
            self.network.disable_tiling()
        else:
            self.network.enable_tiling(side, side, stride, stride)
