"""Which linears of a network become 4-bit, from its config alone."""

from __future__ import annotations

from typing import Any

import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.families import Family, QuantTargets
from dcgen_convert.families.quant_targets import by_kind
from dcgen_convert.svdquant.settings import container_problem, cure
from dcgen_convert.svdquant.skeleton import build


def check_container(container: str, form: str, family: Family) -> None:
    """InputError when the ``container`` does not fit the family or the format."""
    if problem := container_problem(container, form, family):
        raise InputError(problem, "use the container diffusers (--container, or quantize.container)")


def plan_targets(
    family: Family, config: dict[str, Any], dense: str | None, container: str = "diffusers", form: str = "nvfp4"
) -> QuantTargets:
    """The linears to quantise, from a transformer's config; no weights.

    Raises:
        InputError: naming every kind of linear whose shape the container cannot hold and the recipe does not keep
            dense, and the containers that can.
    """
    linears = {
        name: (layer.out_features, layer.in_features)
        for name, layer in build(config).named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    targets = family.quant_targets(linears, dense, container)
    if targets.impossible:
        kinds = "; ".join(f"{name}: {reason}" for name, reason in by_kind(targets.impossible).items())
        keep = "keep them 16-bit with --set quantize.dense=REGEX (quantize: --dense REGEX), or --quantize none"
        raise InputError(
            f"{len(targets.impossible)} linears cannot be quantised: {kinds}",
            cure(family, linears, dense, form, keep),
        )
    if not targets.svdq:
        raise InputError(
            f"no linear of this {family.name} model can be quantised to 4 bits{family.unquantised}",
            "keep it in 16 bits (convert: --quantize none)",
        )
    return targets
