"""What a PNG says about its colours without an ICC profile: the chunks cICP, sRGB, gAMA and cHRM.

Their order of precedence is that of the PNG specification, third edition: cICP, iCCP, sRGB, then gAMA with cHRM. The
numbers of cICP are those of ITU-T H.273. x, y are chromaticities (CIE 1931).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

WHITE = (0.3127, 0.3290)  # D65
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # red, green, blue
PRIMARIES = {  # BT.709, BT.2020, Display P3
    1: SRGB,
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
EXPONENTS = {4: 2.2, 5: 2.8, 8: 1.0, 13: None}  # transfer function -> exponent; None: the curve of sRGB
HDR = {16: "PQ", 18: "HLG"}
NEARLY = 0.01  # exponents and chromaticities that differ by less are those of sRGB, as encoders round them


@dataclass(frozen=True)
class Colours:
    """exponent: light = value^exponent, None for the curve of sRGB; points: of red, green, blue and white."""

    exponent: float | None
    points: tuple[tuple[float, float], ...]


def stated(file: Path) -> Colours | None:
    """What the PNG ``file`` says; None where its colours are sRGB, or described by an ICC profile.

    Raises:
        ValueError: it is an HDR picture, or says what is not known here.
    """
    found = dict(_chunks(file))
    if (cicp := found.get(b"cICP")) is not None and len(cicp) == 4:
        return _code_points(*cicp)
    if b"iCCP" in found or b"sRGB" in found or len(found.get(b"gAMA", b"")) != 4:
        return None
    gamma = int.from_bytes(found[b"gAMA"]) / 100_000
    points: tuple[tuple[float, float], ...] = (*SRGB, WHITE)
    if len(found.get(b"cHRM", b"")) == 32:
        values = [value / 100_000 for value in struct.unpack(">8I", found[b"cHRM"])]
        white, *rest = zip(values[::2], values[1::2], strict=True)
        points = (*rest, white)
    if not 0.01 < gamma < 100 or any(y <= 0 or x + y > 1 for x, y in points):
        return None  # damaged: viewers ignore it
    exponent = None if abs(gamma - 1 / 2.2) < NEARLY else 1 / gamma
    return _unless_plain(Colours(exponent, points))


def to_srgb(image: Image.Image, colours: Colours) -> Image.Image:
    """``image`` (mode L or RGB) with its colours moved to sRGB, mode RGB."""
    value = numpy.asarray(image.convert("RGB"), numpy.float32) / 255
    light = _light_of_srgb(value) if colours.exponent is None else value**colours.exponent
    light = (light @ (numpy.linalg.inv(_xyz((*SRGB, WHITE))) @ _xyz(colours.points)).T.astype(numpy.float32)).clip(0, 1)
    shown = numpy.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return Image.fromarray(numpy.round(shown * 255).astype(numpy.uint8))


def _code_points(primaries: int, transfer: int, matrix: int, full: int) -> Colours | None:
    if transfer in HDR:
        raise ValueError(f"it is an HDR picture ({HDR[transfer]}), and its brightness has no sRGB")
    if primaries not in PRIMARIES or transfer not in EXPONENTS or matrix or full != 1:
        raise ValueError(f"its colours (cICP {primaries}, {transfer}, {matrix}, {full}) are not known here")
    return _unless_plain(Colours(EXPONENTS[transfer], (*PRIMARIES[primaries], WHITE)))


def _unless_plain(colours: Colours) -> Colours | None:
    apart = numpy.abs(numpy.subtract(colours.points, (*SRGB, WHITE))).max()
    return None if colours.exponent is None and apart < NEARLY else colours


def _light_of_srgb(value: numpy.ndarray) -> numpy.ndarray:
    return numpy.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _xyz(points: tuple[tuple[float, float], ...]) -> numpy.ndarray:
    """(3, 3): linear red, green, blue -> XYZ under D65; (1, 1, 1) is white."""
    columns = numpy.array([(x / y, 1, (1 - x - y) / y) for x, y in points]).T
    scale = numpy.linalg.solve(columns[:, :3], columns[:, 3])
    return _adapted(columns[:, 3]) @ (columns[:, :3] * scale)


def _adapted(white: numpy.ndarray) -> numpy.ndarray:
    """(3, 3): XYZ under ``white`` -> XYZ under D65 (Bradford)."""
    cone = numpy.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    x, y = WHITE
    goal = cone @ numpy.array([x / y, 1, (1 - x - y) / y])
    return numpy.linalg.inv(cone) @ numpy.diag(goal / (cone @ white)) @ cone


def _chunks(file: Path) -> Iterator[tuple[bytes, bytes]]:
    """(type, data) of the small chunks before the picture's data."""
    with open(file, "rb") as stream:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            size, kind = int.from_bytes(head[:4]), head[4:]
            if kind == b"IDAT":
                return
            if size > 64:
                stream.seek(size + 4, 1)
                yield kind, b""
            else:
                data = stream.read(size)
                stream.seek(4, 1)
                yield kind, data
