"""DDPM schedules in the terms of the flow convention.

A DDPM network reads x = sqrt(abar) z_0 + sqrt(1 - abar) eps. This is z_t / sqrt(t^2 + (1 - t)^2) for the t with
t / (1 - t) = sqrt(1 - abar) / sqrt(abar).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TRAIN_STEPS = 1000
# (first beta, last beta, e): beta^(1/e) is linear in the step. diffusers calls them "linear" and "scaled_linear".
LINEAR = (1e-4, 0.02, 1)
SCALED_LINEAR = (0.00085, 0.012, 2)
Schedule = tuple[float, float, int]


@cache
def alphas(schedule: Schedule) -> Tensor:
    """abar of every step, (1000,) float64."""
    import torch

    first, last, power = schedule
    betas = torch.linspace(first ** (1 / power), last ** (1 / power), TRAIN_STEPS, dtype=torch.float64) ** power
    return torch.cumprod(1 - betas, 0)


@cache
def noise_times(schedule: Schedule) -> Tensor:
    """t of every step, (1000,) float64."""
    abar = alphas(schedule)
    return (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())


@cache
def _times_on(schedule: Schedule, device: torch.device) -> Tensor:
    """`noise_times` on a device, sent once."""
    return noise_times(schedule).to(device)


def step_at(t: Tensor, schedule: Schedule) -> Tensor:
    """Step (0..999, with fractions) whose noise level is t, interpolated linearly between two steps; (B,) float32."""
    import torch

    table = _times_on(schedule, t.device)
    t = t.to(torch.float64).clamp(table[0], table[-1])
    upper = torch.searchsorted(table, t).clamp(1, TRAIN_STEPS - 1)
    low, high = table[upper - 1], table[upper]
    return (upper - 1 + (t - low) / (high - low)).to(torch.float32)


def network_input(z: Tensor, t: Tensor) -> Tensor:
    """x of the DDPM network for z_t, same shape."""
    return z * (t.square() + (1 - t).square()).rsqrt().to(z.dtype)[:, None, None, None]
