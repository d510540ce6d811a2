"""The shift of the noise levels that a scheduler applies to so many tokens, from its config."""

from __future__ import annotations

import math
from typing import Any


def linear_mu(tokens: int, scheduler: dict[str, Any]) -> float:
    """FLUX's mu, linear in the number of tokens, from the scheduler's config (diffusers: `calculate_shift`)."""
    n0, n1 = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    m0, m1 = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return m0 + (m1 - m0) * (tokens - n0) / (n1 - n0)


def sampling_shift(tokens: int, scheduler: dict[str, Any]) -> float:
    """r in sigma' = r sigma / (1 + (r - 1) sigma), as a FlowMatchEuler config applies it to ``tokens`` image tokens."""
    if scheduler.get("use_dynamic_shifting"):
        return math.exp(linear_mu(tokens, scheduler))
    return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)  # DPM-Solver calls it flow_shift
