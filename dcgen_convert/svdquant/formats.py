"""4-bit and 8-bit number formats, as tensors of values and as codes.

e2m1: sign, 2 exponent bits, 1 mantissa bit: 0 0.5 1 1.5 2 3 4 6 (OCP Microscaling 1.0, 5.3.3).
e4m3: sign, 4 exponent bits, 3 mantissa bits, no infinity, largest 448 (OCP 8-bit floating point, "e4m3fn").
int4: two's complement, -8 .. 7. All rounding is to nearest, ties to even, saturating.
"""

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E4M3_MAX = 6.0, 448.0


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest e2m1 value of every element, ties to the even code, saturating at +-6. float32 in and out.

    The spacing is half the power of two below |x|, at least 0.5. Adding and subtracting 3 * 2^22 spacings makes the
    float32 adder round to a multiple of it, ties to even multiples, which are the even codes.
    """
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    magic = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1).mul_(3 * 2**21)
    return x.add_(magic).sub_(magic)


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Codes 0 .. 15 (uint8; bit 3 is the sign) of tensors that hold exact e2m1 values. Minus zero becomes code 0."""
    magnitude = values.abs()
    code = (2 * magnitude).clamp_(max=4) + (magnitude - 2).clamp_(0, 2) + (magnitude - 4).clamp_(min=0) / 2
    return code.to(torch.uint8) | ((values < 0).to(torch.uint8) << 3)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of codes 0 .. 15."""
    table = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float32, device=codes.device)
    return table[codes.int()]


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest e4m3 value of non-negative x, saturating at 448. float32 in and out."""
    return x.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()


def round_bf16(x: torch.Tensor) -> torch.Tensor:
    """x rounded to bfloat16, as float32."""
    return x.to(torch.bfloat16).float()


def round_int4(x: torch.Tensor) -> torch.Tensor:
    """The nearest integer in -8 .. 7, ties to even. float32 in and out."""
    return x.round().clamp_(-8, 7)


def encode_int4(values: torch.Tensor) -> torch.Tensor:
    """Two's complement nibbles 0 .. 15 (uint8) of integers -8 .. 7."""
    return values.to(torch.int8).view(torch.uint8) & 15


def decode_int4(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of two's complement nibbles."""
    codes = codes.to(torch.int8)
    return (codes - ((codes & 8) << 1)).float()


ROUND = {"nvfp4": round_e2m1, "int4": round_int4}
ENCODE = {"nvfp4": encode_e2m1, "int4": encode_int4}
DECODE = {"nvfp4": decode_e2m1, "int4": decode_int4}
