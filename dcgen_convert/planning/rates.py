"""How fast a machine does each kind of work: assumed, with a range, until a rehearsal has measured it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Rate(NamedTuple):
    """Units of work per second: what is expected, and the slowest and fastest that would be no surprise."""

    expected: float
    slow: float
    fast: float


@dataclass(frozen=True)
class Device:
    """What one rank computes with, and the machine around it.

    Attributes:
        price: US dollars per GPU and hour.
        rates: kind of work -> units per second. "matmul": FLOPs of a transformer; "convolution": FLOPs of an
            autoencoder; "float32": FLOPs of solvers; "columns": columns that GPTQ rounds one after the other; "pixels":
            pixels written as PNG by one core; "decoding": pixels of pictures that the threads of one rank read and
            resize; "disk", "hash", "network": bytes; "starts": processes that import the libraries.
        assumed: where the rates come from, in words.
    """

    name: str
    price: float
    rates: dict[str, Rate]
    assumed: str


CORE = Rate(24e6, 12e6, 50e6)  # pixels that one core decodes; measured: PNG 34 million, JPEG 77, with resizing half
AROUND = {  # one process of the host
    "pixels": Rate(12e6, 6e6, 25e6),
    "decoding": Rate(*(8 * rate for rate in CORE)),  # data.ahead has up to 8 threads
    "disk": Rate(1e9, 0.3e9, 3e9),
    "hash": Rate(1e9, 0.7e9, 2e9),
    "network": Rate(100e6, 20e6, 500e6),
    "starts": Rate(1 / 15, 1 / 40, 1 / 8),
}
H100 = Device(
    "H100",
    2.5,
    {
        "matmul": Rate(0.40 * 989e12, 0.25 * 989e12, 0.55 * 989e12),
        "convolution": Rate(100e12, 50e12, 200e12),
        "float32": Rate(30e12, 15e12, 50e12),
        "columns": Rate(2e4, 0.8e4, 5e4),
        **AROUND,
    },
    "989 TFLOP/s of dense bf16 at 40 % (25 to 55 %) utilisation, autoencoders in fp32 at 100 (50 to 200) TFLOP/s, a "
    "disk of 1 (0.3 to 3) GB/s, pictures decoded by 8 cores per GPU at 24 (12 to 50) million px/s each, 2.50 USD per "
    "GPU and hour",
)
CPUS = Device(
    "2 CPU cores",
    0.0,
    {
        "matmul": Rate(60e9, 25e9, 120e9),
        "convolution": Rate(40e9, 15e9, 100e9),
        "float32": Rate(60e9, 25e9, 120e9),
        "columns": Rate(2e4, 0.5e4, 5e4),
        **AROUND,
        "decoding": Rate(*(2 * rate for rate in CORE)),
    },
    "60 (25 to 120) GFLOP/s on two cores",
)
