"""What a user may choose about quantisation. Imports no torch, because `plan` and the recipes read it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcgen_convert.core.errors import InputError

if TYPE_CHECKING:
    from dcgen_convert.families import Family

GROUP = {"nvfp4": 16, "int4": 64}  # channels that have one micro scale; fixed by the kernels
AWQ_GROUP = 64


def container_problem(container: str, family: Family) -> str:
    """Why the setting ``quantize.container`` does not fit a family; empty when it fits."""
    if container != "nunchaku" or family.nunchaku_container:
        return ""
    return f"the classic nunchaku container is written for FLUX.1 only, not for {family.name}"


@dataclass(frozen=True)
class QuantSettings:
    """Settings of one quantisation run.

    precision    "nvfp4" (e2m1, group 16) or "int4" (group 64): the W4A4 format
    rank         rank of the 16-bit low-rank branch; a multiple of 16, 16 .. 1024
    calibration  "calls": smoothing, Hessians and scores come from the given forward calls; "none": the weights alone
    fuse_qkv     quantise q, k and v as one layer: they share smoothing and the down projection
    seed         seeds the choice of tokens and the random subspaces
    device       torch device that does the arithmetic
    """

    precision: str = "nvfp4"
    rank: int = 32
    calibration: str = "calls"
    fuse_qkv: bool = False
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for field, values in {"precision": tuple(GROUP), "calibration": ("calls", "none")}.items():
            if getattr(self, field) not in values:
                raise InputError(
                    f"quantize: {field} is {getattr(self, field)!r}.", hint=f"Choose one of: {', '.join(values)}."
                )
        if self.rank % 16 or not 16 <= self.rank <= 1024:
            raise InputError(
                f"quantize: rank {self.rank} is not a multiple of 16 from 16 to 1024.", hint="Use --rank 32."
            )

    @property
    def group(self) -> int:
        """Channels per weight scale."""
        return GROUP[self.precision]
