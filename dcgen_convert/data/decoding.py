"""One picture file as every viewer shows it: upright, in sRGB with 8 bits, on white where it is transparent.

Whatever a decoder raises about a file is an InputError that names it, so that one picture never ends a run.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy
from PIL import ExifTags, Image

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import colour, png_colour

# Formats of pictures. Others that Pillow knows are left out: icons, scientific arrays, and EPS, which runs a program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "GIF", "JPEG2000", "PPM", "TGA", "QOI")
NOT_OURS = {".icb", ".vda", ".vst"}  # old suffixes of TGA that other programs use today
DEEP = "I;16"  # Pillow's modes of 16-bit grey begin so
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # a second picture of an MPO file is a preview or a depth map
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the stored picture upright (CIPA DC-008, tag 274)."""
TURNED = (5, 6, 7, 8)  # those that exchange width and height
TRANSPARENT = "transparent, shown on white"
FRAMES = "of several frames, of which the first is used"
PROFILE = "with a colour profile that cannot be used"


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow can open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of `formats`, in small letters."""
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in formats()}
    return frozenset(known - NOT_OURS)


class _Quiet:
    """No warnings while any thread is in here: Pillow warns about details of files that it then reads.

    Python's filters are one list for all threads, so that a `catch_warnings` in each would put back another's.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


_quiet = _Quiet()


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """The picture as Pillow opens it.

    Raises:
        InputError: for whatever goes wrong with the picture in here, with the file's name.
    """
    try:
        if not file.is_file():  # opening a pipe would wait without end
            raise OSError("it does not exist" if not file.exists() else "it is no regular file")
        with _quiet, Image.open(file, formats=formats()) as image:
            yield image
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"the image {file} cannot be read: {reason}", "replace or remove it") from error


def shown_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in px of an opened picture, upright."""
    if image.format == "TIFF":
        image.load()  # turns the picture, and forgets the orientation
    return image.size[::-1] if _orientation(image) in TURNED else image.size


def decode(file: Path) -> tuple[Image.Image, list[str]]:
    """The picture in mode RGB, and what had to be done about it: some of TRANSPARENT, FRAMES, PROFILE.

    Raises:
        InputError: the file is missing, no picture, cut off, damaged or too large.
    """
    notes = []
    with opened(file) as image:
        if image.format in ANIMATED and getattr(image, "is_animated", False):
            notes.append(FRAMES)
        image.load()
        colours, opacity = _separated(image)
        stated = png_colour.stated(file) if image.format == "PNG" else None
        converted: Image.Image | None
        if stated:
            converted = png_colour.to_srgb(colours, stated)
        else:
            converted = colour.to_srgb(colours, image.info.get("icc_profile"))
        if converted is None:
            notes.append(PROFILE)
        shown = converted or colours.convert("RGB")
        if opacity is not None and opacity.getextrema() != (255, 255):
            notes.append(TRANSPARENT)
            shown = Image.composite(shown, Image.new("RGB", shown.size, "white"), opacity)
        method = UPRIGHT.get(_orientation(image))
        return shown.transpose(method) if method is not None else shown, notes


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where the EXIF data are damaged, as viewers do."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  Pillow raises anything about damaged EXIF data
        return 1


def _separated(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours and opacity (mode L) of a picture in any mode; no opacity where nothing can be transparent."""
    if image.mode.startswith(DEEP) or image.mode in ("I", "F"):
        return _eight_bits(image)
    mode = {"P": "RGB", "1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
    if "transparency" in image.info:
        mode = {"L": "LA", "RGB": "RGBA"}.get(mode, mode)
    if image.mode != mode:
        image = image.convert(mode)
    if mode not in ("LA", "RGBA"):
        return image, None
    return image.convert(mode.removesuffix("A")), image.getchannel("A")


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey as 8-bit grey, divided and not cut off; ValueError for values that do not say what white is."""
    if not image.mode.startswith(DEEP) and image.format not in ("PNG", "PPM"):
        raise ValueError("its grey values have 32 bits, and nothing says what white is")
    if image.mode == "F":
        raise ValueError("its grey values are floating-point numbers, and nothing says what white is")
    values, tags = numpy.asarray(image), getattr(image, "tag_v2", {})
    bits = tags.get(BITS, (16,))[0]
    grey = numpy.round(values * (255.0 / (2**bits - 1))).clip(0, 255).astype(numpy.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    clear = image.info.get("transparency")
    opacity = None if clear is None else Image.fromarray(numpy.where(values == clear, 0, 255).astype(numpy.uint8))
    return Image.fromarray(grey), opacity
