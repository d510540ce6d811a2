"""What happens to each linear of a model in 4 bits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ON_PURPOSE = "kept dense"  # first words of the reason when a linear stays dense by choice, not because of its size


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
        """Linears that the formats cannot hold: path -> why. All others in `skipped` stay dense by choice."""
        return {path: reason for path, reason in self.skipped.items() if not reason.startswith(ON_PURPOSE)}


def by_kind(reasons: dict[str, str]) -> dict[str, str]:
    """Shorten `QuantTargets.skipped` for people: layers that differ only in the number of their block share a line."""
    counts: dict[tuple[str, str], int] = {}
    for path, reason in reasons.items():
        kind = re.sub(r"\.\d+\.", ".*.", path, count=1), reason
        counts[kind] = counts.get(kind, 0) + 1
    return {f"{pattern} ({count})": reason for (pattern, reason), count in counts.items()}
