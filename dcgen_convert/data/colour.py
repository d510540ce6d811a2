"""Embedded colour profiles (ICC): the colours that a viewer shows, in sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy
from PIL import Image, ImageCms

INPUTS = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # colour space of a profile -> Pillow's mode
SAME = 2  # grey levels: a profile that changes no colour by more is sRGB itself, and is left alone
STEPS = 9  # colours per axis that this is tried on


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """``image`` in mode RGB, with its colours moved from ``profile`` to sRGB.

    Without a profile they are sRGB already. None when the profile is damaged or belongs to another kind of picture.
    """
    if not profile:
        return image.convert("RGB")
    mode, transform = _transform(profile)
    if mode == "RGB" and image.mode in ("L", "YCbCr"):
        image = image.convert("RGB")
    if mode != image.mode:
        return None
    return transform.apply(image) if transform else image.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes) -> tuple[str | None, ImageCms.ImageCmsTransform | None]:
    """(mode of the pictures that a profile describes, their way to sRGB). No way is needed where it changes nothing.

    The mode is None for a profile that cannot be used.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = INPUTS.get(source.profile.xcolor_space.strip())
        if mode is None:
            return None, None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        probe = _probe(mode)
        apart = numpy.asarray(transform.apply(probe), int) - numpy.asarray(probe.convert("RGB"), int)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None, None
    return mode, None if numpy.abs(apart).max() <= SAME else transform


def _probe(mode: str) -> Image.Image:
    """Colours from everywhere in the space of ``mode``."""
    axis = numpy.linspace(0, 255, STEPS).astype(numpy.uint8)
    bands = 1 if mode == "L" else len(mode)
    colours = numpy.stack(numpy.meshgrid(*[axis] * bands), axis=-1).reshape(-1, 1, bands)
    return Image.frombytes(mode, (1, len(colours)), colours.tobytes())
