"""Linears in ComfyUI's own 8-bit and 4-bit formats, made a few rows at a time.

N out channels, K in channels, G = K / 16. The tensor `comfy_quant` of a linear names its format, as the bytes of JSON.

    float8_e4m3fn   weight e4m3 (N, K); weight_scale float32 (): w = code * weight_scale. full_precision_matrix_mult:
                    the product is computed with the dequantised weight. Without it ComfyUI rounds the inputs to e4m3
                    too, with the scale 1: what is above 448 is cut off, and small inputs lose all their bits
    nvfp4           weight uint8 (N, K/2): two e2m1 codes in a byte, the one of the even channel in the upper four bits;
                    weight_scale e4m3: (N, G), padded to multiples of (128, 4), in `blocked` order;
                    weight_scale_2 float32 (): w = code * weight_scale * weight_scale_2

This nvfp4 is plain block-16: no low-rank branch, no smoothing, no calibration. Its inputs are rounded to nvfp4 too,
with scales of their own.
Source: QUANTIZATION.md, comfy/ops.py and comfy/quant_ops.py of ComfyUI 0.28; float_utils.py of comfy_kitchen 0.2.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dcgen_convert.checkpoint.held import Part, row_chunks
from dcgen_convert.checkpoint.stream import Item
from dcgen_convert.checkpoint.tensors import as_bytes
from dcgen_convert.core.errors import InputError
from dcgen_convert.svdquant.formats import E4M3_MAX
from dcgen_convert.svdquant.settings import GROUP
from dcgen_convert.svdquant.weights import group_scales, round_to_nearest, search_factor, tensor_scale

NVFP4 = "nvfp4"
TILE = (128, 4)  # rows and columns of a tile of scales


@dataclass(frozen=True)
class Computed(Item):
    """A tensor whose rows are computed when they are written."""

    pieces: Callable[[], Iterator[Tensor]]

    def chunks(self) -> Iterator[memoryview]:
        for piece in self.pieces():
            yield as_bytes(piece, self.dtype)


class ComfyLinear(ABC):
    """The weight of one linear, rounded to a format.

    Args:
        name: of the linear. shape: (N, K). parts: the rows of tensors that its weight is made of.
    """

    conf: ClassVar[dict[str, Any]]  # what `comfy_quant` says

    def __init__(self, name: str, shape: tuple[int, ...], parts: tuple[Part, ...]) -> None:
        self.name, self.shape, self.parts = name, shape, parts
        self.lost = self.energy = 0.0  # sums over the rows that were written: (w - Q(w))^2 and w^2

    def items(self) -> dict[str, Item]:
        """Full name -> tensor of the file."""
        data = list(json.dumps(self.conf).encode())
        mark = Computed("U8", (len(data),), lambda: iter([torch.tensor(data, dtype=torch.uint8)]))
        return {f"{self.name}.{leaf}": item for leaf, item in {**self.tensors(), "comfy_quant": mark}.items()}

    @abstractmethod
    def tensors(self) -> dict[str, Item]:
        """Leaf -> tensor of the file, without `comfy_quant`."""

    def rows(self) -> Iterator[Tensor]:
        """The weight, (n, K) at a time, float32."""
        return (rows.float() for _, _, rows in row_chunks(self.parts))

    @cached_property
    def largest(self) -> float:
        """The largest |w|; InputError where a weight is not finite."""
        found = 0.0
        for rows in self.rows():
            low, high = (bound.item() for bound in rows.aminmax())  # NaN where there is one
            if not math.isfinite(low + high):
                raise InputError(
                    f"{self.parts[0][0].entry.file} holds NaN or infinite values in {self.name}",
                    "dcgen-convert verify names the tensor",
                )
            found = max(found, -low, high)
        return found

    def noted(self, rows: Tensor, meaning: Tensor) -> None:
        """Count the error of ``rows`` whose codes mean ``meaning``."""
        self.lost += float((rows - meaning).square().sum())
        self.energy += float(rows.square().sum())


class Float8Linear(ComfyLinear):
    """One scale for the whole weight, so that the largest |w| becomes 448, the largest e4m3 value."""

    conf: ClassVar[dict[str, Any]] = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}

    @property
    def scale(self) -> float:
        return float(torch.tensor(self.largest / E4M3_MAX or 1.0))  # as the file holds it, in float32

    def tensors(self) -> dict[str, Item]:
        return {
            "weight": Computed("F8_E4M3", self.shape, self.codes),
            "weight_scale": Computed("F32", (), lambda: iter([torch.tensor(self.scale)])),
        }

    def codes(self) -> Iterator[Tensor]:
        """e4m3 (n, K)."""
        for rows in self.rows():
            codes = (rows / self.scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            self.noted(rows, codes.float() * self.scale)
            yield codes


class Nvfp4Linear(ComfyLinear):
    """A scale for the weight and one for 16 channels of a row, searched for the least squared error."""

    conf: ClassVar[dict[str, Any]] = {"format": NVFP4}

    def __init__(self, name: str, shape: tuple[int, ...], parts: tuple[Part, ...]) -> None:
        super().__init__(name, shape, parts)
        if any(size % GROUP[NVFP4] for size in shape):
            raise InputError(
                f"{name} has the weight {list(shape)}, and NVFP4 needs multiples of {GROUP[NVFP4]}",
                "use --weights fp8",
            )

    @cached_property
    def scale(self) -> float:
        return tensor_scale(torch.tensor(self.largest), NVFP4)

    @cached_property
    def micro(self) -> Tensor:
        """Scales e4m3 (N, G): kept, because the codes need them after they are written. One byte for 16 weights."""
        found = [group_scales(rows, NVFP4, self.scale, search_factor(rows, NVFP4, self.scale)) for rows in self.rows()]
        return torch.cat([part.to(torch.float8_e4m3fn) for part in found])

    def tensors(self) -> dict[str, Item]:
        n, k = self.shape
        scales = tuple(math.ceil(size / tile) * tile for size, tile in zip((n, k // GROUP[NVFP4]), TILE, strict=True))
        return {
            "weight": Computed("U8", (n, k // 2), self.codes),
            "weight_scale": Computed("F8_E4M3", scales, lambda: iter([blocked(self.micro)])),
            "weight_scale_2": Computed("F32", (), lambda: iter([torch.tensor(self.scale)])),
        }

    def codes(self) -> Iterator[Tensor]:
        """uint8 (n, K/2)."""
        done = 0
        for rows in self.rows():
            micro = self.micro[done : done + len(rows)].float()
            done += len(rows)
            rounded = round_to_nearest(rows, micro, self.scale, NVFP4)
            self.noted(rows, rounded.dequantise())
            codes = rounded.codes()
            yield codes[:, 0::2] << 4 | codes[:, 1::2]
        del self.micro


def blocked(scales: Tensor) -> Tensor:
    """Scales (N, G) as cuBLAS reads them, padded with zeros to multiples of (128, 4).

    Tiles of 128 x 4 follow one another, row by row of tiles. In a tile, row i of each quarter of 32 rows stands
    together: 4 quarters x 4 scales, 16 bytes. Source: cuBLAS, "1D block scaling factors layout".
    """
    n, g = scales.shape
    high, wide = (math.ceil(size / tile) for size, tile in zip((n, g), TILE, strict=True))
    whole = torch.zeros(high * 128, wide * 4, dtype=torch.uint8)
    whole[:n, :g] = scales.view(torch.uint8)
    tiles = whole.view(high, 4, 32, wide, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high * 128, wide * 4).view(scales.dtype)


# --weights -> how a linear of attention or MLP is written, and one of modulation. The latter sees one row a picture and
# not one a token: 4-bit arithmetic has nothing to win there.
FORMATS: dict[str, tuple[type[ComfyLinear], type[ComfyLinear]]] = {
    "fp8": (Float8Linear, Float8Linear),
    "nvfp4": (Nvfp4Linear, Float8Linear),
}
