"""The guidance-corrected loss with both branches in one forward pass of twice the batch.

The same loss and gradient as `objective.guidance_corrected_loss` with the student's null branch, up to rounding. It
saves a forward pass's launches, not its work: the backward pass also runs over the null half, whose gradient is zero,
and that half's activations are kept. So it pays only where one micro-batch leaves the device half empty, and takes
twice the memory for activations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcgen_convert.families import Family, Text
from dcgen_convert.train.objective import Draws, corrected_error, drop_text, noised, predict


def batched_corrected_loss(
    family: Family, model: nn.Module, z0: Tensor, text: Text, draws: Draws, null: Text, data_guidance: float = 1.0
) -> Tensor:
    """The corrected loss with v(null) from the same pass, without gradient; scalar.

    Args: as `objective.guidance_corrected_loss`; z0 (B, C, h, w), the network sees 2 B.
    """
    z = noised(z0, draws.eps, draws.t)
    conditioned = drop_text(text, null, draws.dropped)
    nothing = drop_text(text, null, torch.ones_like(draws.dropped))
    both = {key: torch.cat([conditioned[key], nothing[key]]) for key in conditioned}
    guidance = torch.cat([draws.guidance, torch.ones_like(draws.guidance)])
    v_g, v_null = predict(family, model, torch.cat([z, z]), draws.t.repeat(2), both, guidance).chunk(2)
    return corrected_error(v_g, v_null.detach(), draws.guidance, data_guidance, family.target(z0, draws.eps))
