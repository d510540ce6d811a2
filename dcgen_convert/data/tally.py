"""How many files something happened to, with a few of their names."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN = 3  # names that are given as examples


@dataclass
class Tally:
    """Counts by kind, in the order in which the kinds were met first."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """One more file, called ``name``."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < SHOWN:
            shown.append(name)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def of(self, kind: str) -> str:
        """`3: a.png, b.png, c.png` or `5: a.png, b.png, c.png, ...`."""
        count, names = self.counts[kind], self.examples[kind]
        return f"{count}: {', '.join(names)}{', ...' if count > len(names) else ''}"

    def reasons(self) -> str:
        """`because of their format (2: a.heic, b.psd), because ...`, for kinds that begin with "because"."""
        return ", ".join(f"{kind} ({self.of(kind)})" for kind in self.counts)
