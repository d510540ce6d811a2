"""The index formulas of the format document (nunchaku's file format), element by element, in plain Python: the
reference for `pack` and for readers.
"""


def qweight(n: int, k: int, big_k: int) -> tuple[int, int]:
    """(byte offset, nibble) of code [n, k]."""
    tn, j, h, g = n // 128, n % 128 // 16, n % 16 // 8, n % 8
    tk, c, q, i = k // 64, k % 64 // 32, k % 32 // 8, k % 8
    lane = 4 * g + q
    u32 = ((tn * (big_k // 64) + tk) * 8 + j) * 32 * 4 + lane * 4 + 2 * h + c
    return 4 * u32 + i // 2, i % 2


def channel(ch: int) -> int:
    return (ch // 16) * 16 + 4 * ((ch % 8) // 2) + 2 * ((ch % 16) // 8) + ch % 2


def scale_int4(n: int, kg: int, big_k: int) -> int:
    return (n // 128 * (big_k // 64) + kg) * 128 + channel(n % 128)


def scale_nvfp4(n: int, kg: int, big_k: int) -> int:
    nn = n % 128
    lane = 4 * (nn % 8) + nn % 32 // 8
    return ((n // 128 * (big_k // 64) + kg // 4) * 32 + lane) * 4 * 4 + nn // 32 * 4 + kg % 4


def down(r: int, k: int, rank: int) -> int:
    lane = 4 * (r % 8) + (k % 8) // 2
    e = 4 * ((r % 16) // 8) + 2 * ((k % 16) // 8) + k % 2
    return (((k // 16) * (rank // 16) + r // 16) * 32 + lane) * 8 + e


def up(n: int, r: int, rank: int) -> int:
    lane = 4 * (n % 8) + (r % 8) // 2
    e = 4 * ((n % 16) // 8) + 2 * ((r % 16) // 8) + r % 2
    return (((n // 16) * (rank // 16) + r // 16) * 32 + lane) * 8 + e


def awq(n: int, k: int, big_k: int) -> tuple[int, int]:
    """(16-bit word offset, nibble) of code [n, k]."""
    return (((n // 4 * (big_k // 64) + k // 64) * 4 + n % 4) * 2 + (k % 64) // 32) * 8 + k % 8, (k % 32) // 8
