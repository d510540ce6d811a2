"""Which linears of the converted model become 4-bit, and which its container cannot hold: from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcgen_convert.families.quant_targets import CONTAINERS, QuantTargets, by_kind
from dcgen_convert.planning.shapes import Shapes
from dcgen_convert.recipe.schema import Quantize
from dcgen_convert.svdquant.settings import container_problem, cure, held_by


def quantised_linears(section: Quantize, sizes: Shapes) -> tuple[dict[str, Any] | None, list[tuple[str, str]]]:
    """(the part `quantization` of the plan, problems with their cures); (None, []) where nothing is quantised.

    In that part, w4a4 and w4a16 are numbers of linears. dense: kind of block linear -> why it stays 16-bit.
    impossible: kind of block linear -> why the container cannot hold it. containers: what each container can hold, the
    same numbers; `share` is the part of all weights that becomes 4-bit.
    """
    if section.format == "none":
        return None, []
    family, layers = sizes.family, [layer for layer in sizes.converted.layers if not layer.convolution]
    linears = {layer.name: (layer.outputs, layer.inputs) for layer in layers}
    targets = family.quant_targets(linears, section.dense, section.container)
    dense = {path: reason for path, reason in targets.skipped.items() if path not in targets.impossible}
    impossible = by_kind(targets.impossible)
    weights = {layer.name: layer.weights / sizes.converted.parameters for layer in layers}
    part = {
        "format": section.format,
        "rank": section.rank if CONTAINERS[section.container].branch else 0,
        "container": section.container,
        "w4a4": len(targets.svdq),
        "w4a16": len(targets.awq),
        "dense": by_kind(dense),
        "impossible": impossible,
        "containers": {
            name: _held(found, weights)
            for name, found in held_by(family, linears, section.dense, section.format).items()
        },
    }
    keep = "keep it 16-bit with --set quantize.dense=REGEX, or --quantize none"
    help = cure(family, linears, section.dense, section.format, keep) if impossible else ""
    problems = [(f"{name} cannot be quantised, {reason}", help) for name, reason in impossible.items()]
    if not problems and not targets.svdq:
        told = f"no linear of this {family.name} model can be quantised to 4 bits{family.unquantised}"
        problems.append((told, "use --quantize none"))
    if problem := container_problem(section.container, section.format, family):
        problems.append((problem, "leave out quantize.container"))
    return part, problems


def _held(found: QuantTargets | str, weights: Mapping[str, float]) -> dict[str, Any]:
    """What a container holds; ``weights``: linear -> its part of all weights."""
    if isinstance(found, str):
        return {"problem": found}
    held = [*found.svdq, *found.awq]
    return {
        "w4a4": len(found.svdq),
        "w4a16": len(found.awq),
        "impossible": len(found.impossible),
        "share": sum(weights[name] for name in held),
    }
