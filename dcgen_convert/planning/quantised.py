"""Which linears of the converted model become 4-bit, and which no 4-bit format can hold: from shapes alone."""

from __future__ import annotations

from typing import Any

from dcgen_convert.families.quant_targets import by_kind
from dcgen_convert.planning.shapes import Shapes
from dcgen_convert.recipe.schema import Quantize
from dcgen_convert.svdquant.settings import container_problem


def quantised_linears(section: Quantize, sizes: Shapes) -> tuple[dict[str, Any] | None, list[tuple[str, str]]]:
    """(the part `quantization` of the plan, problems with their cures); (None, []) where nothing is quantised.

    In that part, w4a4 and w4a16 are numbers of linears. dense: kind of block linear -> why it stays 16-bit.
    impossible: kind of block linear -> why no 4-bit format can hold it.
    """
    if section.format == "none":
        return None, []
    linears = {layer.name: (layer.outputs, layer.inputs) for layer in sizes.converted.layers if not layer.convolution}
    targets = sizes.family.quant_targets(linears, section.dense)
    dense = {path: reason for path, reason in targets.skipped.items() if path not in targets.impossible}
    impossible = by_kind(targets.impossible)
    part = {
        "format": section.format,
        "rank": section.rank,
        "container": section.container,
        "w4a4": len(targets.svdq),
        "w4a16": len(targets.awq),
        "dense": by_kind(dense),
        "impossible": impossible,
    }
    problems = [
        (f"{name} cannot be quantised, {reason}", "keep it 16-bit with --set quantize.dense=REGEX, or --quantize none")
        for name, reason in impossible.items()
    ]
    if not problems and not targets.svdq:
        told = f"no linear of this {sizes.family.name} model can be quantised to 4 bits{sizes.family.unquantised}"
        problems.append((told, "use --quantize none"))
    if problem := container_problem(section.container, sizes.family):
        problems.append((problem, "leave out quantize.container"))
    return part, problems
