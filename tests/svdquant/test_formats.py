"""e2m1, e4m3 and int4 rounding against exhaustive tables in exact arithmetic."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from dcgen_convert.svdquant import formats

E2M1 = [Fraction(v) for v in (0, "1/2", 1, "3/2", 2, 3, 4, 6)]


def nearest_even(value: Fraction, table: list[Fraction]) -> Fraction:
    """The table's nearest entry to a non-negative value; of two equally near the one with the even position."""
    return min(table, key=lambda entry: (abs(entry - value), table.index(entry) % 2))


def test_e2m1_rounds_to_nearest_even_code_and_saturates():
    grid = [Fraction(i, 64) for i in range(64 * 8)]  # holds every tie, 0.25 .. 5, and values past the end
    wanted = torch.tensor([float(nearest_even(v, E2M1)) for v in grid])
    x = torch.tensor([float(v) for v in grid])
    assert torch.equal(formats.round_e2m1(x), wanted)
    assert torch.equal(formats.round_e2m1(-x), -wanted)
    assert formats.round_e2m1(torch.tensor([torch.inf, -1e30])).tolist() == [6, -6]


def test_e2m1_codes_are_the_format_and_zero_has_one_code():
    values = torch.tensor([float(v) for v in E2M1])
    assert formats.encode_e2m1(values).tolist() == list(range(8))
    assert formats.encode_e2m1(-values).tolist() == [0, *range(9, 16)]  # minus zero is written as code 0
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15], dtype=torch.uint8)
    assert torch.equal(formats.encode_e2m1(formats.decode_e2m1(codes)), codes)
    assert formats.decode_e2m1(torch.tensor([8], dtype=torch.uint8)).item() == 0


def e4m3_value(byte: int) -> Fraction:
    """OCP e4m3fn of a non-negative byte, from its bit fields."""
    exponent, mantissa = byte >> 3, byte & 7
    return (
        Fraction(mantissa, 8) * Fraction(1, 64)
        if exponent == 0
        else (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
    )


def test_e4m3_rounds_to_nearest_even_over_its_whole_range():
    table = [e4m3_value(byte) for byte in range(127)]
    assert max(table) == 448
    points = sorted(
        {p for a, b in pairwise(table) for p in (a, (a + b) / 2, (3 * a + b) / 4, (a + 3 * b) / 4)}
        | {Fraction(460), Fraction(10**6)}
    )
    got = formats.round_e4m3(torch.tensor([float(p) for p in points], dtype=torch.float32))
    assert got.tolist() == [float(nearest_even(p, table)) for p in points]


@pytest.mark.parametrize(
    "value, wanted", [(-9.0, -8), (-8.4, -8), (-0.5, 0), (0.5, 0), (1.5, 2), (2.5, 2), (6.6, 7), (7.6, 7)]
)
def test_int4_rounds_and_saturates(value, wanted):
    assert formats.round_int4(torch.tensor([value])).item() == wanted


def test_int4_nibbles_are_twos_complement():
    values = torch.arange(-8, 8).float()
    codes = formats.encode_int4(values)
    assert codes.tolist() == [*range(8, 16), *range(8)]
    assert torch.equal(formats.decode_int4(codes), values)
