"""Time of one whole layer against one full singular value decomposition of it, and packing throughput.

`python tests/benchmarks/svdquant_speed.py [out channels] [in channels]`, by default a 3072 x 12288 linear. The
published tool does 39 such decompositions per layer (after arXiv 2411.05007). Bars: less time than one; >= 200 MB/s of
bf16 weights per core.
"""

import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from dcgen_convert.svdquant import pack
from dcgen_convert.svdquant.layer import quantize_linears
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.stats import Gatherer


class Taken(NamedTuple):
    """Seconds by the clock, and of all cores together, which a busy machine does not stretch."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.1f} s ({self.cpu:.1f} CPU s)"


def clock() -> Callable[[], Taken]:
    wall, cpu = time.monotonic(), time.process_time()
    return lambda: Taken(time.monotonic() - wall, time.process_time() - cpu)


def packing() -> float:
    """MB of bf16 weight per second and core: quantised codes to the kernel's layout."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    codes = torch.randint(0, 16, (3072, 12288), dtype=torch.uint8)
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        pack.pack_qweight(codes)
        best = min(best, time.process_time() - began)
    torch.set_num_threads(threads)
    return codes.numel() * 2 / 1e6 / best


def main(n: int, k: int) -> None:
    print(f"packing {packing():.0f} MB/s of bf16 weights on one core, bar 200")
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(5.0).sample((n, k)) * 0.02
    weight += 0.01 * torch.randn(n, 64) @ torch.randn(64, k)
    tokens = (torch.randn(4096, k) + 0.5 * torch.randn(4096, 64) @ torch.randn(64, k) / 8) * (
        0.5 * torch.randn(k)
    ).exp()
    gathered = clock()
    gatherer = Gatherer("layer", k, 1, 0)
    gatherer.add(tokens, 0)
    stats = gatherer.stats()
    print(f"statistics of 4096 tokens: {gathered()}")
    mine = clock()
    layer = quantize_linears(["layer"], [weight], [None], stats, QuantSettings(), torch.Generator().manual_seed(0))[0]
    taken = mine()
    record, threads = layer.record, torch.get_num_threads()
    print(f"{n} x {k}, {threads} threads: {taken} with {record['candidates']} smoothing candidates", end=" ")
    print(f"(error {record['error']:.4f}, round to nearest {record['error_rtn']:.4f})")
    print(f"peak memory so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB", flush=True)
    full = clock()
    torch.linalg.svd(weight.double(), full_matrices=True)
    whole = full()
    ratio = taken.cpu / whole.cpu
    print(
        f"one full float64 singular value decomposition: {whole}; this tool takes {ratio:.2f} of its CPU time, bar < 1"
    )


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:] or ("3072", "12288")))
