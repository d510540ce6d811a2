"""Ridge regression from streamed normal equations in float64: exact, in one pass.

The memory is K x (K + D) numbers, whatever the number of rows. Sums and products stay on the device of the rows. They
are float64 there too. Products in float32 are no substitute: features are nearly collinear and far from zero, and then
their rounding alone can double the error (tests/stages/test_ridge.py). And they save nothing: next to the network that
makes the features, the products are a small part of the work, also on GPUs with few float64 units.

Model y ~ W x + b with x (K,), y (D,). Minimises E|W x + b - y|^2 + ridge * tr(Cov x)/K * |W|^2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dcgen_convert.core.errors import InputError


class NormalEquations:
    """Accumulates E[x], E[y], E[x x^T], E[x y^T], E|y|^2 over rows, on ``device``."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.yy = zeros(), zeros()
        self.x, self.y = zeros(inputs), zeros(outputs)
        self.xx, self.xy = zeros(inputs, inputs), zeros(inputs, outputs)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> NormalEquations:
        """The equations whose sums `tensors` gave."""
        found = cls(*tensors["xy"].shape)
        for name in vars(found):
            setattr(found, name, tensors[name].to(device))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, on the CPU."""
        return {name: value.cpu() for name, value in vars(self).items()}

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Rows x (R, K) and y (R, D), any float dtype, each counted ``weight`` (R,) times; summed in float64."""
        device, exact = self.xx.device, torch.float64
        x, y = (rows.reshape(-1, rows.shape[-1]).to(device, exact) for rows in (x, y))
        weight = torch.ones_like(x[:, 0]) if weight is None else weight.reshape(-1).to(device, exact)
        wx, wy = weight[:, None] * x, weight[:, None] * y
        self.count += weight.sum()
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
        weight, bias = weight.to(self.xx), bias.to(self.xx)
        residual = self.yy + self.count * bias @ bias + (weight @ self.xx * weight).sum()
        residual = residual - 2 * (weight * self.xy.T).sum() - 2 * bias @ self.y + 2 * bias @ (weight @ self.x)
        return max(residual.item(), 0.0) / (self.count.item() * len(self.y))
