"""Gates of a release: limits that the figures of an evaluation must keep."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation.rows import FORMS


@dataclass(frozen=True)
class Gate:
    """name: of a figure (`rows.names`). limit: the smallest ("min") or largest ("max") value that passes."""

    name: str
    kind: Literal["min", "max"]
    limit: float

    def passes(self, value: float) -> bool:
        return value >= self.limit if self.kind == "min" else value <= self.limit

    def record(self, value: float) -> dict[str, Any]:
        """The gate with the value that was measured, as evaluation.json holds it."""
        return {**asdict(self), "value": value, "passed": self.passes(value)}

    def told(self, value: float) -> str:
        """What is wrong, as a part of a sentence."""
        word = "below the smallest" if self.kind == "min" else "above the largest"
        return f"{self.name} is {value:.6g}, {word} value that --{self.kind} allows, {self.limit:g}"


def parse(smallest: Iterable[str], largest: Iterable[str]) -> list[Gate]:
    """The gates of the texts NAME=VALUE that were given with --min and --max; InputError for another form."""
    return [*(_gate(text, "min") for text in smallest), *(_gate(text, "max") for text in largest)]


def _gate(text: str, kind: Literal["min", "max"]) -> Gate:
    name, _, number = text.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not name.strip() or not math.isfinite(limit):
        raise InputError(f"--{kind} takes NAME=VALUE, not {text[:80]!r}", f"for example --{kind} clip=27.5")
    return Gate(name.strip(), kind, limit)


def require_measured(gates: Sequence[Gate], names: Sequence[str], left_out: Mapping[str, str]) -> None:
    """InputError for a gate on a figure that there will not be.

    Args:
        names: of the figures that there will be. left_out: measure -> why it cannot run.
    """
    for gate in gates:
        if gate.name in names:
            continue
        why = next((f": {reason}" for name, reason in left_out.items() if _is_of(gate.name, name)), "")
        near = difflib.get_close_matches(gate.name, names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"--{gate.kind} {gate.name}={gate.limit:g}: {gate.name} is not measured here{why}",
            f"{hint}measured are {', '.join(names) or 'no figures'}",
        )


def _is_of(figure: str, measure: str) -> bool:
    return figure in [form.format(measure) for form in FORMS]
