"""Pixels as pictures of 8 bits, and pictures as pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def to_image(pixels: Tensor) -> Image:
    """(3, H, W) in [-1, 1] -> PIL image."""
    import torch
    from PIL import Image

    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def fitted(image: Image, height: int, width: int) -> Tensor:
    """(3, height, width) float32 in [-1, 1]: the largest centred part of that shape, resized with Lanczos.

    The part begins at a whole pixel. It is the same part for all sizes of one shape.
    """
    import numpy
    import torch
    from PIL import Image

    across, down = min(image.width, image.height * width / height), min(image.height, image.width * height / width)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))
    array = numpy.array(image, dtype=numpy.float32)
    array /= 127.5  # in place: a large picture is not copied
    array -= 1
    return torch.from_numpy(array).permute(2, 0, 1)
