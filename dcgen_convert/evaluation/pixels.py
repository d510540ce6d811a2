"""Pictures as the measures see them: 8 bits first, as in a file, and through JPEG where the reference pictures were."""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor


def to_uint8(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8 on the CPU: 127.5 x + 128, cut to 0..255, without its fraction.

    This is how the authors of DC-Gen make the pictures that they measure.
    """
    return (pictures.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu()


def to_float(pictures: Tensor) -> Tensor:
    """The inverse of `to_uint8`: uint8 -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def to_images(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> PIL pictures of 8 bits."""
    return [Image.fromarray(one.permute(1, 2, 0).contiguous().numpy()) for one in to_uint8(pictures)]


def from_images(images: list[Image.Image]) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    return to_float(torch.stack([_pixels(image) for image in images]))


def through_jpeg(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] written as JPEG with Pillow's default quality, and read again.

    The authors of DC-Gen measure so, as the pictures of MJHQ-30K are JPEG files too. It changes an FID visibly.
    """
    read = []
    for image in to_images(pictures):
        file = BytesIO()
        image.save(file, format="JPEG")
        with Image.open(file, formats=["JPEG"]) as again:
            read.append(again.convert("RGB"))
    return from_images(read)


def _pixels(image: Image.Image) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)
