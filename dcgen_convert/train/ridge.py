"""Ridge regression from streamed normal equations in float64: exact, in one pass.

The memory is K x (K + D) numbers, whatever the number of rows.

Model y ~ W x + b with x (K,), y (D,). Minimises E|W x + b - y|^2 + ridge * tr(Cov x)/K * |W|^2.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_save


class NormalEquations:
    """Accumulates E[x], E[y], E[x x^T], E[x y^T], E|y|^2 over rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.count = 0.0
        self.x = torch.zeros(inputs, dtype=torch.float64)
        self.y = torch.zeros(outputs, dtype=torch.float64)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64)
        self.yy = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Rows x (R, K) and y (R, D), any float dtype, each counted ``weight`` (R,) times; summed in float64."""
        x, y = x.reshape(-1, x.shape[-1]).double().cpu(), y.reshape(-1, y.shape[-1]).double().cpu()
        count, wx, wy = float(len(x)), x, y
        if weight is not None:
            weight = weight.reshape(-1, 1).double().cpu()
            count, wx, wy = weight.sum().item(), weight * x, weight * y
        self.count += count
        self.x += wx.sum(0)
        self.y += wy.sum(0)
        self.xx.addmm_(wx.T, x)
        self.xy.addmm_(wx.T, y)
        self.yy += (wy * y).sum()

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """The equations of both sets of rows together."""
        both = NormalEquations(len(self.x), len(self.y))
        for name in vars(both):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def save(self, path: Path, done: tuple[int, int]) -> None:
        """Keep the sums, and how far they go, in a safetensors file."""
        sums = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in vars(self).items()}
        atomic_save({**sums, "done": torch.tensor(done)}, path)

    @classmethod
    def load(cls, path: Path) -> tuple[NormalEquations, tuple[int, int]]:
        """What `save` wrote."""
        sums = load_file(path)
        first, second = sums.pop("done").tolist()
        found = cls(len(sums["x"]), len(sums["y"]))
        for name, value in sums.items():
            setattr(found, name, value.item() if name == "count" else value)
        return found, (first, second)

    def solve(self, ridge: float, bias: bool = True) -> tuple[Tensor, Tensor]:
        """W (D, K) and b (D,), float64.

        Args:
            bias: False for a module without one: the best W with b = 0.
        Raises:
            InputError: no rows, or non-finite rows.
        """
        if not self.count or not torch.isfinite(self.xx).all() or not torch.isfinite(self.xy).all():
            raise InputError(
                f"the regression has {self.count:g} rows or non-finite values", "check the latents of this run"
            )
        mean_x, mean_y = self.x / self.count, self.y / self.count
        covariance, cross = self.xx / self.count, self.xy / self.count
        if not bias:
            mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        covariance = covariance - torch.outer(mean_x, mean_x)
        cross = cross - torch.outer(mean_x, mean_y)
        # A floor far below the data keeps the factorisation defined for channels that never vary.
        scale = covariance.diagonal().mean().clamp_min(1e-30)
        covariance.diagonal().add_((ridge + 1e-12) * scale)
        weight = torch.linalg.solve(covariance, cross, left=True).T
        return weight, mean_y - weight @ mean_x

    def mse(self, weight: Tensor, bias: Tensor) -> float:
        """Mean squared error per output of y ~ W x + b on the accumulated rows, without touching them again."""
        weight, bias = weight.double().cpu(), bias.double().cpu()
        residual = self.yy + self.count * bias @ bias + (weight @ self.xx * weight).sum()
        residual = residual - 2 * (weight * self.xy.T).sum() - 2 * bias @ self.y + 2 * bias @ (weight @ self.x)
        return max(residual.item(), 0.0) / (self.count * len(self.y))
