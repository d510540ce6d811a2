"""What a user may choose about quantisation. Imports no torch: `plan` and the recipes read it too."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dcgen_convert.core.errors import InputError

if TYPE_CHECKING:
    from dcgen_convert.families import Family

GROUP = {"nvfp4": 16, "int4": 64}  # channels that share one micro scale; fixed by the kernels
AWQ_GROUP = 64


def container_problem(container: str, family: Family) -> str:
    """Why the setting ``quantize.container`` does not fit a family; empty when it fits."""
    if container != "nunchaku" or family.nunchaku_container:
        return ""
    return f"the classic nunchaku container is written for FLUX.1 only, not for {family.name}"


@dataclass(frozen=True)
class Settings:
    """Settings of one quantisation run.

    precision         "nvfp4" (e2m1, group 16) or "int4" (group 64): the W4A4 format
    rank              rank of the 16-bit low-rank branch; a multiple of 16, 16 .. 1024
    calibration       "calls": smoothing, Hessians and scores from the given forward calls; "none": from the weights
                      alone
    smoothing         search a per-channel smoothing (needs calibration)
    gptq              quantise the residual by GPTQ instead of round-to-nearest (needs calibration)
    scale_search      choose every group's scale by its own squared error instead of abs-max
    refits            how often the low-rank branch is fitted again to what the 4-bit weight missed
    fuse_qkv          quantise q, k and v as one layer: they share smoothing and the down projection
    samples           tokens kept per layer for scoring, drawn evenly from all calls
    hessian_tokens    at most this many tokens per layer enter the Hessian (0: all)
    seed              seeds the token draw and the random subspaces
    dense_dtype       "keep" copies other tensors byte for byte; "bf16" casts fp32 ones
    device            torch device that the arithmetic runs on
    max_shard_bytes   a weight file is closed before it would pass this size
    """

    precision: str = "nvfp4"
    rank: int = 32
    calibration: str = "calls"
    smoothing: bool = True
    gptq: bool = True
    scale_search: bool = True
    refits: int = 2
    fuse_qkv: bool = False
    samples: int = 512
    hessian_tokens: int = 32768
    seed: int = 0
    dense_dtype: str = "keep"
    device: str = "cpu"
    max_shard_bytes: int = 5 * 1000**3

    def __post_init__(self):
        allowed = {"precision": tuple(GROUP), "calibration": ("calls", "none"), "dense_dtype": ("keep", "bf16")}
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise InputError(
                    f"quantize: {field} is {getattr(self, field)!r}.", hint=f"Choose one of: {', '.join(values)}."
                )
        if self.rank % 16 or not 16 <= self.rank <= 1024:
            raise InputError(
                f"quantize: rank {self.rank} is not a multiple of 16 from 16 to 1024.", hint="Use --rank 32."
            )
        for field, least in {"samples": 16, "hessian_tokens": 0, "refits": 0, "max_shard_bytes": 1}.items():
            if getattr(self, field) < least:
                raise InputError(
                    f"quantize: {field} is {getattr(self, field)}, the least is {least}.", hint=f"Raise {field}."
                )

    @property
    def group(self) -> int:
        """Channels per weight scale."""
        return GROUP[self.precision]

    def as_dict(self) -> dict:
        """Plain values, for JSON and fingerprints."""
        return asdict(self)
