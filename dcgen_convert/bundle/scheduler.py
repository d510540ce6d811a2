"""The scheduler config that a bundle carries: the timestep shift it samples with must be the one it was trained with.

sigma' = r sigma / (1 + (r - 1) sigma). Two conventions in DC-Gen's published models: FLUX's own dynamic shift, r =
e^mu with mu linear in the token count, and "flux2", r = sqrt(C H W / 4096) over the elements of the latent (arXiv
2509.25180, official code).
"""

from __future__ import annotations

import math
from typing import Any

from dcgen_convert.core.errors import InputError

FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
FLUX_LINE = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
# What bends the noise levels after the shift. The DC-Gen authors' code leaves it out under "flux2".
UNBENT = {
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
}


def flux2_shift(channels: int, tokens: int) -> float:
    """r = sqrt(C H W / 4096) of a latent with ``channels`` channels on ``tokens`` = H W grid points (patch 1)."""
    return math.sqrt(channels * tokens / 4096)


def scheduler_config(
    base: dict[str, Any], shift: str | float, *, channels: int = 0, tokens: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The base's scheduler config with the bundle's shift in it.

    Args:
        base: scheduler_config.json of the base model.
        shift: "model" keeps the base's rule; "flux2" is the latent-size rule at the given sizes; "flux" is FLUX.1's
            line of mu, whatever numbers the base has; a number is a static r.
        channels: latent channels C, for "flux2".
        tokens: latent grid points H W of every size that the bundle is trained for, for "flux2". One size gives a
            static shift. Two sizes give the line of mu through both. It is exact at these two sizes; do not use it
            beyond them.

    Raises:
        InputError: the scheduler has no shift, or the rule cannot be expressed in its config.
    """
    # diffusers lists here the keys that were left at their default, and from_config ignores them. The shift that is
    # set below may be one of them.
    base = {key: value for key, value in base.items() if key != "_use_default_values"}
    if shift == "model":
        return base
    if shift == "flux":
        return base | FLUX_LINE
    if shift != "flux2":
        return _static(base, _number(shift))
    sizes = sorted(set(tokens))
    if not sizes or channels < 1:
        raise InputError("shift flux2 needs the latent channels and at least one size", "give the shift as a number")
    if len(sizes) == 1:
        return _static(base, flux2_shift(channels, sizes[0]))
    if len(sizes) > 2 or base.get("_class_name") != FLOW_EULER or not base.get("use_dynamic_shifting"):
        raise InputError(
            f"shift flux2 for the {len(sizes)} sizes of {sizes} tokens cannot be written into a "
            f"{base.get('_class_name')} config",
            "train and sample at one size, or set adapt.shift to a number",
        )
    return {
        **base,
        "base_image_seq_len": sizes[0],
        "max_image_seq_len": sizes[1],
        "base_shift": math.log(flux2_shift(channels, sizes[0])),
        "max_shift": math.log(flux2_shift(channels, sizes[1])),
        "time_shift_type": "exponential",
    }


def _number(shift: str | float) -> float:
    try:
        value = float(shift)
    except ValueError:
        raise InputError(f"shift is {shift!r}", 'it must be "model", "flux2" or a positive number') from None
    if not 0 < value < math.inf:
        raise InputError(f"shift is {value}", "it must be a positive number")
    return value


def _static(base: dict[str, Any], r: float) -> dict[str, Any]:
    if base.get("_class_name") == FLOW_EULER:
        return {**base, "use_dynamic_shifting": False, "shift": r}
    if base.get("use_flow_sigmas"):  # DPMSolver and UniPC in their flow-matching form, as SANA ships
        return {**base, "flow_shift": r}
    raise InputError(f"{base.get('_class_name')} has no timestep shift to set to {r:g}", 'set adapt.shift to "model"')
