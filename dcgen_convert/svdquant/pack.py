"""Byte layouts that nunchaku's kernels read (nunchaku's file format): every permutation as a view and a permute, with
its inverse.

N out channels, K in channels, R rank, G scale groups along K. The formulas of the format document, element by element,
are in the tests.
"""

import torch


def pack_qweight(codes: torch.Tensor) -> torch.Tensor:
    """4.1: nibbles uint8 (N, K) -> int8 (N, K/2). Eight neighbours along K make one 32-bit word; words are then tiled
    128 x 64. One row of tiles at a time stays in the cache.
    """
    n, k = codes.shape
    packed = torch.empty(n // 128, k // 64, 8, 8, 4, 2, 2, dtype=torch.int32, device=codes.device)
    for tile, rows in zip(packed, codes.split(128), strict=True):
        words = _nibbles_to_bytes(rows).view(torch.int32)  # (128, K/8)
        tile.copy_(words.view(8, 2, 8, k // 64, 2, 4).permute(3, 0, 2, 5, 1, 4))
    return packed.view(torch.int8).view(n, k // 2)


def unpack_qweight(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_qweight`: int8 (N, K/2) -> nibbles uint8 (N, K)."""
    n, k = packed.shape[0], packed.shape[1] * 2
    tiles = packed.contiguous().view(torch.int32).view(n // 128, k // 64, 8, 8, 4, 2, 2)
    words = tiles.permute(0, 2, 5, 3, 1, 6, 4).contiguous().view(n, k // 8)
    return _bytes_to_nibbles(words.view(torch.uint8))


def pack_channels(vector: torch.Tensor) -> torch.Tensor:
    """4.2: bias, wcscales (N,) and smooth_factor (K,): inside every 16 the order 0 1 8 9 | 2 3 10 11 | 4 5 12 13 | 6 7
    14 15.
    """
    return vector.view(-1, 2, 4, 2).permute(0, 2, 1, 3).reshape(-1)


def unpack_channels(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_channels`."""
    return packed.view(-1, 4, 2, 2).permute(0, 2, 1, 3).reshape(-1)


def pack_scales_int4(scales: torch.Tensor) -> torch.Tensor:
    """4.3: (N, K/64) -> (K/64, N), tile-major over N; the shape is nominal."""
    n, g = scales.shape
    return scales.view(n // 128, 8, 2, 4, 2, g).permute(0, 5, 1, 3, 2, 4).reshape(g, n)


def unpack_scales_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_scales_int4`."""
    g, n = packed.shape
    return packed.reshape(n // 128, g, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, g)


def pack_scales_nvfp4(scales: torch.Tensor) -> torch.Tensor:
    """4.4: e4m3 (N, K/16) -> e4m3 (K/16, N), tile-major over N; the shape is nominal."""
    n, g = scales.shape
    tiles = scales.view(torch.uint8).view(n // 128, 4, 4, 8, g // 4, 4).permute(0, 4, 3, 2, 1, 5)
    return tiles.reshape(g, n).view(torch.float8_e4m3fn)


def unpack_scales_nvfp4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_scales_nvfp4`."""
    g, n = packed.shape
    tiles = packed.contiguous().view(torch.uint8).view(n // 128, g // 4, 8, 4, 4, 4).permute(0, 4, 3, 2, 1, 5)
    return tiles.reshape(n, g).view(torch.float8_e4m3fn)


def pack_down(down: torch.Tensor) -> torch.Tensor:
    """4.5: D (R, K) -> proj_down (K, R) in 16 x 16 mma tiles."""
    r, k = down.shape
    return down.view(r // 16, 2, 8, k // 16, 2, 4, 2).permute(3, 0, 2, 5, 1, 4, 6).reshape(k, r)


def unpack_down(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_down`."""
    k, r = packed.shape
    return packed.reshape(k // 16, r // 16, 8, 4, 2, 2, 2).permute(1, 4, 2, 0, 5, 3, 6).reshape(r, k)


def pack_up(up: torch.Tensor) -> torch.Tensor:
    """4.6: U (N, R) -> proj_up (N, R) in 16 x 16 mma tiles."""
    n, r = up.shape
    return up.view(n // 16, 2, 8, r // 16, 2, 4, 2).permute(0, 3, 2, 5, 1, 4, 6).reshape(n, r)


def unpack_up(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_up`."""
    n, r = packed.shape
    return packed.reshape(n // 16, r // 16, 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6).reshape(n, r)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """4.7: unsigned codes uint8 (N, K) -> int32 (N/4, K/2). A 16-bit word holds channels 8 apart."""
    n, k = codes.shape
    quads = codes.view(n // 4, 4, k // 64, 2, 4, 8).permute(0, 2, 1, 3, 5, 4)  # (N/4, K/64, 4, 2, 8, 4 nibbles)
    return _nibbles_to_bytes(quads.reshape(n // 4, k * 4)).view(torch.int32)


def unpack_awq(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_awq`: int32 (N/4, K/2) -> uint8 (N, K)."""
    n, k = packed.shape[0] * 4, packed.shape[1] * 2
    nibbles = _bytes_to_nibbles(packed.contiguous().view(torch.uint8))
    return nibbles.view(n // 4, k // 64, 4, 2, 8, 4).permute(0, 2, 1, 3, 5, 4).reshape(n, k)


def _nibbles_to_bytes(nibbles: torch.Tensor) -> torch.Tensor:
    """(..., 2 M) nibbles -> (..., M) bytes, the first of a pair in the low four bits."""
    pairs = nibbles.contiguous().view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)  # the cast drops the upper byte


def _bytes_to_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """(..., M) bytes -> (..., 2 M) nibbles."""
    wide = packed.to(torch.int16)
    return ((wide & 15) | ((wide & 240) << 4)).view(torch.uint8)
