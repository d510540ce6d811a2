"""Bytes per pixel that an autoencoder needs at its peak, beside its weights, and how many pictures it takes together.

All tensors that are alive were counted at the published sizes, with pictures of 1024 px; a test counts them again.
In float32 the input of a convolution counts twice: on a CPU, oneDNN keeps it in a layout of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dcgen_convert.families import deep_autoencoders as deep
from dcgen_convert.families import grid
from dcgen_convert.families.catalog import AUTOENCODERS

ENCODE, DECODE = 0, 1
TOGETHER = 1024**2  # px that an autoencoder encodes or decodes together; a larger picture is taken alone
DRAWN = 8 * 1024**2  # px that a pipeline draws together; a larger picture is drawn alone
TILED = 2048  # px of a side; larger pictures are taken in tiles that overlap
TILE = 1024  # px of a tile's side
FRAME_WHOLE = 2**19  # px of a frame; an AutoencoderDCVideo takes larger ones in tiles: those of 480 x 832 px are whole
FRAME_TILE = 512  # px of the side of such a tile
FRAMES = 80  # of a video, in the bytes below
RESULTS = (12, 40)  # bytes per px of a picture in tiles: its three colours in float32; tiles, rows and the whole

# dtype -> (encode, decode)
Bytes = dict[str, tuple[int, int]]
SHALLOW: dict[str, Bytes] = {  # by class
    "AutoencoderKL": {"fp32": (2572, 3870), "bf16": (1286, 1568)},
    "AutoencoderKLFlux2": {"fp32": (2572, 3870), "bf16": (1286, 1568)},
    "AutoencoderKLHunyuanImage": {"fp32": (2050, 2050), "bf16": (768, 896)},
    "AutoencoderKLQwenImage": {"fp32": (5040, 8090), "bf16": (2500, 3462)},
}
RESIDUAL = "AutoencoderKLWan of Wan 2.2"  # one with is_residual
DC_VIDEO = "AutoencoderDCVideo"
LTX = "AutoencoderKLLTX2Video"  # takes all frames whole: in proportion to them
VIDEO: dict[str, Bytes] = {  # by class, per px of a frame: with 80 frames, which all but one work on in chunks
    "AutoencoderKLWan": {"fp32": (16860, 22220), "bf16": (7914, 10593)},
    RESIDUAL: {"fp32": (9800, 23830), "bf16": (4680, 11304)},
    DC_VIDEO: {"fp32": (60470, 59020), "bf16": (24840, 24115)},
    LTX: {"fp32": (16720, 17160), "bf16": (7030, 7085)},  # of 81
}
DEEP: dict[tuple[str | None, int], Bytes] = {  # by make and factor
    (deep.IN, 32): {"fp32": (1281, 1228), "bf16": (896, 678)},
    (deep.IN, 64): {"fp32": (1281, 1354), "bf16": (896, 741)},
    (deep.IN, 128): {"fp32": (1281, 1481), "bf16": (896, 804)},
    (deep.SANA, 32): {"fp32": (2564, 2955), "bf16": (1792, 1734)},
    (deep.LITE, 32): {"fp32": (2564, 1157), "bf16": (1792, 834)},
    (deep.FIFTEEN, 32): {"fp32": (1281, 1153), "bf16": (896, 832)},
    (deep.FIFTEEN, 64): {"fp32": (1281, 1153), "bf16": (896, 832)},
}
OTHER = {0: DEEP[deep.IN, 32], 1: DEEP[deep.SANA, 32]}  # of another make: without or with layers at full size
WIDTHS = {"AutoencoderKLWan": 96, RESIDUAL: 160, DC_VIDEO: 256, LTX: 256}  # channels of those in VIDEO
WIDTH = 128  # channels at full size of those that were counted


def bytes_per_pixel(config: Mapping[str, Any]) -> Bytes:
    """dtype -> (encode, decode) of the autoencoder with this config.json; in proportion for one of another width."""
    kind = RESIDUAL if config.get("is_residual") else str(config.get("_class_name"))
    kind = LTX if kind in grid.LTX else kind
    if kind in VIDEO:
        width = config.get("base_dim") or (config.get("block_out_channels") or [None])[0]
        return _scaled(VIDEO[kind], [width] if width else None, WIDTHS[kind])
    if config.get("_class_name") in SHALLOW:
        return _scaled(SHALLOW[config["_class_name"]], config.get("block_out_channels"))
    for entry in AUTOENCODERS.values():
        if deep.kind_of(entry) is not None and _same(config, deep.config_of(entry)):
            return DEEP[deep.kind_of(entry), entry.factor]
    layers = [config.get(f"{side}_layers_per_block") or (1,) for side in ("encoder", "decoder")]
    return _scaled(OTHER[int(any(part[0] for part in layers))], config.get("encoder_block_out_channels"))


def picture_bytes(each: float, way: int, height: int, width: int) -> int:
    """Bytes of one picture of this size, in px, that needs ``each`` bytes per px where it is taken whole.

    In tiles one tile is worked on, beside the picture (way ENCODE), or the results of all tiles until they are put
    together (DECODE). Of a video any number of frames needs as much: they are worked on in chunks.
    """
    if max(height, width) <= TILED:
        return int(each * height * width)
    return int(each * TILE**2 + RESULTS[way] * height * width)


def video_bytes(each: float, way: int, height: int, width: int, frames: int = FRAMES) -> int:
    """The same of a video of this size, through an AutoencoderDCVideo."""
    if height * width <= FRAME_WHOLE:
        return int(each * height * width)
    return int(each * FRAME_TILE**2 + frames * RESULTS[way] * height * width)


def peak_bytes(config: Mapping[str, Any], dtype: str, way: int, height: int, width: int, frames: int = FRAMES) -> int:
    """Bytes that the autoencoder with this config.json works with for one picture or one video of this size, in px."""
    each, kind = bytes_per_pixel(config)[dtype][way], config.get("_class_name")
    if kind in grid.LTX:
        return int(each * height * width * frames / (FRAMES + 1))
    if kind == DC_VIDEO:
        return video_bytes(each, way, height, width, frames)
    return picture_bytes(each, way, height, width)


def together(batch: int, pixels: int, most: int = TOGETHER) -> int:
    """Pictures of ``pixels`` px that are taken together: up to ``batch``, and up to ``most`` px; at least 1."""
    return max(1, min(batch, most // pixels))


def _same(config: Mapping[str, Any], published: Mapping[str, Any]) -> bool:
    keys = [f"{side}_{what}" for side in ("encoder", "decoder") for what in ("block_out_channels", "layers_per_block")]
    return all(list(config.get(key) or ()) == list(published[key]) for key in keys)


def _scaled(known: Bytes, widths: Sequence[int] | None, width: int = WIDTH) -> Bytes:
    share = widths[0] / width if widths else 1.0
    return {dtype: (round(share * encode), round(share * decode)) for dtype, (encode, decode) in known.items()}
