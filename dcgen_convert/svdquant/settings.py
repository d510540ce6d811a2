"""What a user may choose about quantisation. Imports no torch, because `plan` and the recipes read it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.quant_targets import CONTAINERS, QuantTargets

if TYPE_CHECKING:
    from dcgen_convert.families import Family

GROUP = {"nvfp4": 16, "int4": 64}  # channels that have one micro scale; fixed by the kernels
AWQ_GROUP = 64
NEEDS_INPUTS = (
    "the container bfl needs calibration: it stores a scale for the inputs of each linear, which the weights alone do "
    "not give"
)


def container_problem(container: str, form: str, family: Family) -> str:
    """Why the settings ``quantize.container`` and ``quantize.format`` do not fit a family, or each other; empty when
    they do.
    """
    if container == "nunchaku" and not family.nunchaku_container:
        return f"the classic nunchaku container is written for FLUX.1 only, not for {family.name}"
    if form not in CONTAINERS[container].formats:
        return f"the container {container} holds {' and '.join(CONTAINERS[container].formats)} only, not {form}"
    if container == "bfl" and not family.single_file:
        return f"diffusers reads the container bfl as a single file, and has no reader of one for {family.model_class}"
    return ""


def held_by(
    family: Family, linears: Mapping[str, tuple[int, int]], dense: str | None, form: str
) -> dict[str, QuantTargets | str]:
    """Container -> what becomes of the ``linears`` path -> (N, K) of a model in it, or why it cannot be had at all."""
    return {
        name: container_problem(name, form, family) or family.quant_targets(dict(linears), dense, name)
        for name in CONTAINERS
    }


def cure(family: Family, linears: Mapping[str, tuple[int, int]], dense: str | None, form: str, otherwise: str) -> str:
    """What to do about linears that the chosen container cannot hold: name those that can, then ``otherwise``."""
    able = [
        f"use --set quantize.container={name} (quantize: --container {name}), which holds them"
        + ("" if CONTAINERS[name].branch else ", without the 16-bit branch")
        for name, found in held_by(family, linears, dense, form).items()
        if isinstance(found, QuantTargets) and found.svdq and not found.impossible
    ]
    return ", or ".join([*able, otherwise])


@dataclass(frozen=True)
class QuantSettings:
    """Settings of one quantisation run.

    precision    "nvfp4" (e2m1, group 16) or "int4" (group 64): the W4A4 format
    rank         rank of the 16-bit low-rank branch; a multiple of 16, 16 .. 1024. 0: neither branch nor smoothing,
                 plain block-16 weights as the container bfl holds them
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
        if self.plain:
            self._check_plain()
        elif self.rank % 16 or not 16 <= self.rank <= 1024:
            raise InputError(
                f"quantize: rank {self.rank} is not a multiple of 16 from 16 to 1024.", hint="Use --rank 32."
            )

    def _check_plain(self) -> None:
        """InputError for what a container without smoothing and branch has no place for."""
        if self.precision not in CONTAINERS["bfl"].formats:
            raise InputError(f"quantize: rank 0 is for nvfp4 only, not for {self.precision}.", hint="Use --rank 32.")
        if self.calibration == "none":
            raise InputError(NEEDS_INPUTS, hint="give --calibration N, or use the container diffusers")

    @property
    def plain(self) -> bool:
        """Whether the W4A4 linears have neither smoothing nor a low-rank branch."""
        return self.rank == 0

    @property
    def group(self) -> int:
        """Channels per weight scale."""
        return GROUP[self.precision]
