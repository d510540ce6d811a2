"""Which linears of a network each container of 4-bit weights can hold, from their shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

ON_PURPOSE = "kept dense"  # first words of the reason when a linear stays dense by choice, not because of its size


@dataclass(frozen=True)
class Container:
    """What a container of 4-bit weights can hold.

    Attributes:
        multiple: both sides of a W4A4 linear are multiples of it.
        w4a16: whether it holds W4A16 linears too.
        formats: the 4-bit formats of its W4A4 linears.
        branch: whether a W4A4 linear has smoothing and a 16-bit branch of low rank.
    """

    multiple: int
    w4a16: bool
    formats: tuple[str, ...]
    branch: bool


SVDQUANT = Container(128, w4a16=True, formats=("nvfp4", "int4"), branch=True)
# quantize.container -> what it can hold. `diffusers` is nunchaku_lite, which counts in tiles of 128 (nunchaku's kernels
# have no tests of bounds). `bfl` is block-16 NVFP4: its scales need multiples of 16, and the kernel of FlashInfer
# multiples of 32 (flashinfer 0.6, csrc/fp4_gemm_cutlass.cu).
CONTAINERS = {"diffusers": SVDQUANT, "nunchaku": SVDQUANT, "bfl": Container(32, False, ("nvfp4",), branch=False)}


@dataclass(frozen=True)
class QuantTargets:
    """What happens to each linear of the blocks, by exact module path.

    Attributes:
        svdq: linears for W4A4.
        awq: linears for W4A16.
        skipped: path -> why this linear stays dense.
        blocks: the family's ModuleLists of repeated blocks, quantised or not.
    """

    svdq: list[str]
    awq: list[str]
    skipped: dict[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    @property
    def impossible(self) -> dict[str, str]:
        """Linears that the container cannot hold: path -> why. All others in `skipped` stay dense by choice."""
        return {path: reason for path, reason in self.skipped.items() if not reason.startswith(ON_PURPOSE)}


def sort(
    linears: Mapping[str, tuple[int, int]], modulation: str, kept: str, dense: str | None, name: str
) -> tuple[list[str], list[str], dict[str, str]]:
    """(W4A4, W4A16, path -> why it stays dense) of the block linears path -> (out features N, in features K).

    Args:
        modulation, kept: regexes of the family's linears for W4A16, and of those that it keeps dense.
        dense: regex of those that the recipe keeps dense. name: of the container.
    """
    svdq, awq, skipped, container = [], [], {}, CONTAINERS[name]
    for path, (n, k) in linears.items():
        if dense and re.fullmatch(dense, path):
            skipped[path] = f"{ON_PURPOSE} by the recipe"
        elif re.fullmatch(modulation, path):
            if not container.w4a16:
                skipped[path] = f"{ON_PURPOSE}, the container {name} has no W4A16"
            elif k % 64 or n % 128:
                skipped[path] = f"W4A16 needs in % 64 = 0 and out % 128 = 0, it has {k} -> {n}"
            else:
                awq.append(path)
        elif re.fullmatch(kept, path):
            skipped[path] = f"{ON_PURPOSE} by the family"
        elif n % container.multiple or k % container.multiple:
            skipped[path] = f"the 4-bit format needs multiples of {container.multiple}, it has {k} -> {n}"
        else:
            svdq.append(path)
    return svdq, awq, skipped


def by_kind(reasons: dict[str, str]) -> dict[str, str]:
    """Shorten `QuantTargets.skipped` for people: layers that differ only in the number of their block share a line."""
    counts: dict[tuple[str, str], int] = {}
    for path, reason in reasons.items():
        kind = re.sub(r"\.\d+\.", ".*.", path, count=1), reason
        counts[kind] = counts.get(kind, 0) + 1
    return {f"{pattern} ({count})": reason for (pattern, reason), count in counts.items()}
