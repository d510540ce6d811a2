"""The networks that a model draws with. Most models have one; some have one for each part of the noise levels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expert:
    """One network of a model.

    Attributes:
        name: ends the names of its stages and folders in a run; empty where the model has one network.
        component: its name in the stock pipeline, and of its folder.
        low, high: the noise levels t that it draws at, low <= t < high; the last one draws at t = 1 too.
    """

    name: str
    component: str
    low: float = 0.0
    high: float = 1.0

    @property
    def within(self) -> tuple[float, float]:
        """The noise levels that it draws at."""
        return self.low, self.high

    def of(self, stage: str) -> str:
        """Name of its stage ``stage``: "surgery", or "surgery-low" of the expert "low"."""
        return f"{stage}-{self.name}" if self.name else stage


WHOLE = Expert("", "")  # stands for a model with all its networks
