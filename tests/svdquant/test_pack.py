"""Every permutation against the format document's index formulas, element by element, over legal shapes; and its
inverse, exactly.
"""

import numpy as np
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dcgen_convert.svdquant import pack

from . import layouts

sides = st.integers(1, 3).map(lambda tiles: 128 * tiles)
ranks = st.integers(1, 4).map(lambda tiles: 16 * tiles)
seeds = st.integers(0, 2**31)
few = settings(max_examples=6, deadline=None, phases=(Phase.generate,))  # shrinking would walk every element again


def nibbles(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def numbers(*shape: int) -> torch.Tensor:
    """Every element different."""
    return torch.arange(float(np.prod(shape))).view(shape)


@few
@given(sides, sides, seeds)
def test_qweight(n, k, seed):
    codes = nibbles(n, k, seed)
    packed = pack.pack_qweight(codes)
    assert packed.dtype == torch.int8 and packed.shape == (n, k // 2)
    flat, source, wanted = packed.view(torch.uint8).flatten().numpy(), codes.numpy(), np.zeros(n * k // 2, np.uint8)
    for row in range(n):
        for column in range(k):
            byte, nibble = layouts.qweight(row, column, k)
            wanted[byte] |= source[row, column] << (4 * nibble)
    assert np.array_equal(flat, wanted)
    assert torch.equal(pack.unpack_qweight(packed), codes)


@few
@given(sides)
def test_channels(n):
    vector = numbers(n)
    packed = pack.pack_channels(vector)
    assert [packed[layouts.channel(i)].item() for i in range(n)] == vector.tolist()
    assert packed[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert torch.equal(pack.unpack_channels(packed), vector)


@few
@given(sides, sides)
def test_scales_int4(n, k):
    scales = numbers(n, k // 64)
    packed = pack.pack_scales_int4(scales)
    assert packed.shape == (k // 64, n)
    flat = packed.flatten()
    assert all(flat[layouts.scale_int4(row, g, k)] == scales[row, g] for row in range(n) for g in range(k // 64))
    assert torch.equal(pack.unpack_scales_int4(packed), scales)


@few
@given(sides, sides, seeds)
def test_scales_nvfp4(n, k, seed):
    raw = torch.randint(0, 127, (n, k // 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack.pack_scales_nvfp4(raw.view(torch.float8_e4m3fn))
    assert packed.dtype == torch.float8_e4m3fn and packed.shape == (k // 16, n)
    flat, source = packed.view(torch.uint8).flatten().numpy(), raw.numpy()
    assert all(flat[layouts.scale_nvfp4(row, g, k)] == source[row, g] for row in range(n) for g in range(k // 16))
    assert torch.equal(pack.unpack_scales_nvfp4(packed).view(torch.uint8), raw)


@few
@given(sides, ranks)
def test_down(k, rank):
    matrix = numbers(rank, k)
    packed = pack.pack_down(matrix)
    assert packed.shape == (k, rank)
    flat, source = packed.flatten().numpy(), matrix.numpy()
    assert all(flat[layouts.down(r, c, rank)] == source[r, c] for r in range(rank) for c in range(k))
    assert torch.equal(pack.unpack_down(packed), matrix)


@few
@given(sides, ranks)
def test_up(n, rank):
    matrix = numbers(n, rank)
    packed = pack.pack_up(matrix)
    assert packed.shape == (n, rank)
    flat, source = packed.flatten().numpy(), matrix.numpy()
    assert all(flat[layouts.up(row, r, rank)] == source[row, r] for row in range(n) for r in range(rank))
    assert torch.equal(pack.unpack_up(packed), matrix)


@few
@given(st.integers(1, 12).map(lambda eights: 8 * eights), st.integers(1, 4).map(lambda groups: 64 * groups), seeds)
def test_awq(n, k, seed):
    codes = nibbles(n, k, seed)
    packed = pack.pack_awq(codes)
    assert packed.dtype == torch.int32 and packed.shape == (n // 4, k // 2)
    words, source, wanted = packed.view(torch.int16).flatten().numpy(), codes.numpy(), np.zeros(n * k // 4, np.uint16)
    for row in range(n):
        for column in range(k):
            word, nibble = layouts.awq(row, column, k)
            wanted[word] |= np.uint16(int(source[row, column]) << (4 * nibble))
    assert np.array_equal(words.view(np.uint16), wanted)
    assert torch.equal(pack.unpack_awq(packed), codes)
