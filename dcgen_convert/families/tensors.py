"""Small tensors that several families make: rows of numbers, padded texts, positions.

B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def guidance_input(model: Any, guidance: Tensor | None, z: Tensor, scale: float = 1.0) -> Tensor | None:
    """``guidance`` times ``scale`` in the dtype of ``z``, (B,), for a network with guidance_embeds; else None."""
    if not model.config.guidance_embeds:
        return None
    if guidance is None:
        raise TypeError(f"{type(model).__name__} has a guidance input, but no guidance was given")
    return (guidance * scale).to(z.dtype)


def padded(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Text features (L_i, D) of B prompts as (B, length, D) with zeros at the end, and their 0 / 1 mask (B, length)."""
    import torch

    embeds = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    mask = torch.zeros(len(rows), length, dtype=torch.long, device=embeds.device)
    for i, row in enumerate(rows):
        embeds[i, : len(row)], mask[i, : len(row)] = row, 1
    return embeds, mask


def token_ids(rows: int, columns: int, like: Tensor) -> Tensor:
    """FLUX's position ids (0, row, column) of an image's tokens, (N, 3), with the dtype and the device of ``like``."""
    import torch

    axes = (torch.arange(length, dtype=torch.float32, device=like.device) for length in (1, rows, columns))
    return torch.cartesian_prod(*axes).to(like.dtype)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (B,), one for each row of ``like`` (B, ...), in a shape that multiplies it: (B, 1, ..., 1)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def constant_rows(like: Tensor, *values: float) -> Tensor:
    """``values`` for each picture of ``like`` (B, ...): (B, values) in its dtype, made on its device."""
    import torch

    return torch.cat([like.new_full((len(like), 1), value) for value in values], dim=1)


def added_positions(embed: Any, channels: int, grid: tuple[int, ...]) -> Tensor:
    """What the patch embedder of diffusers adds to its projection of a latent of ``grid`` tokens, (N, D).

    Args:
        embed: diffusers' PatchEmbed or a class with the same attributes.
    """
    z = embed.proj.weight.new_zeros(1, channels, *(side * embed.patch_size for side in grid))
    tokens = embed(z)[0]
    return tokens if embed.proj.bias is None else tokens - embed.proj.bias


def pooled(maps: Tensor, to: Sequence[int]) -> Tensor:
    """The mean of the cells of ``maps`` (B, D, *grid) in each cell of the coarser grid ``to``: (B, D, *to).

    Of videos with fewer latent frames in ``to``, T of T0 = 1 + k (T - 1): the first is of the first alone, and each
    other one of k (`grid.Time`).
    """
    import torch
    import torch.nn.functional as F

    size = tuple(to)
    if len(size) == 2 or maps.shape[2] == size[0]:
        return F.interpolate(maps, size=size, mode="area")
    first = F.interpolate(maps[:, :, :1], size=(1, *size[1:]), mode="area")
    return torch.cat([first, F.interpolate(maps[:, :, 1:], size=(size[0] - 1, *size[1:]), mode="area")], dim=2)
