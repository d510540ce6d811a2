"""Expected speed-up: the ratio of FLOPs of one denoising step, beside what the paper measured for the same case."""

from __future__ import annotations

from dcgen_convert.planning.arithmetic import forward_flops
from dcgen_convert.planning.shapes import Shapes

PAPER = {
    ("flux", 1024, 32): (4.2, "latency 4.65 -> 1.10 s, one H100, 20 steps"),
    ("flux", 2048, 64): (16.9, "latency 23.76 -> 1.41 s, one H100, 20 steps"),
    ("flux", 4096, 64): (52.9, "latency 213.81 -> 4.04 s, one H100, 20 steps"),
    ("sana", 1024, 64): (3.9, "throughput 110.7 -> 435.7 images/min, SANA-1.6B"),
    ("dit", 512, 32): (4.7, "throughput 0.85 -> 4.03 images/s, DiT-XL"),
}
"""(family, px, new f) -> (speed-up, what was measured). arXiv 2509.25180; the autoencoder of the 2K row is inferred."""


def speedup(sizes: Shapes, side: int) -> dict:
    """FLOPs of one step before / after at equal px; text tokens, embedders and modulation included, decoders not."""
    before = forward_flops(sizes.base, sizes.seen(sizes.old, side), sizes.text)
    after = forward_flops(sizes.converted, sizes.seen(sizes.new, side), sizes.text)
    return {
        "resolution": side,
        "flops_before": before,
        "flops_after": after,
        "value": before / after,
        "basis": "scaled: FLOPs of one denoising step from the configs; decoder and text encoders not counted",
    }


def measured(family: str, side: int, factor: int) -> dict | None:
    """The paper's own measurement of this case, if it has one."""
    row = PAPER.get((family, side, factor))
    return {"value": row[0], "basis": f"measured by the paper: {row[1]}"} if row else None
