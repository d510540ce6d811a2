"""What training minimises, as pure functions, and the random draws behind it.

B batch, C latent channels, h w latent grid, which of a video is T h w. Flow convention (arXiv 2509.25180): z_t =
(1 - t) z_0 + t eps, v = eps - z_0, t in [0, 1].

A guidance-distilled network outputs v_g = v_0 + g (v_c - v_0) for its guidance input g. With the null text the guidance
has no effect: v_g(null) = v_0. So the velocity without guidance is v_hat = [v_g(c) - (1 - g) v(null)] / g. The
corrected loss compares v_hat with v.

The base model drew the training pictures with some guidance g_d, and the pictures show it: their v is v_0 + g_d (v_c -
v_0), not v_c. The published loss takes this v for v_c. The converted model is then guided twice. With g_d > 1 the loss
uses v_hat = v(null) + (g_d / g) (v_g(c) - v(null)) instead, which for g_d = 1 is the formula above. Guidance then has
the same meaning as in the base model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcgen_convert.families import Family, Text
from dcgen_convert.families.base import NULL, Network
from dcgen_convert.families.tensors import per_row

TRAINING, EVALUATION = 0, 1  # streams of random numbers that never meet
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Sampling:
    """How the draws of a sample are distributed.

    Attributes:
        kind: "logit-normal" | "ddpm" (uniform over the steps of a DDPM schedule).
        shift: r of t' = r t / (1 + (r - 1) t), the same as the bundle samples with; 1 disables. Unused with "ddpm".
        guidance_range: g ~ U(lo, hi) for networks with a guidance input.
        text_drop: probability that a sample sees the null text.
        times: (S,) noise level t of every DDPM step, for "ddpm".
        within: (low, high): only noise levels between these are drawn, those of a network that draws at no others. With
            "logit-normal" alone.
    """

    kind: str
    shift: float
    guidance_range: tuple[float, float]
    text_drop: float
    times: Tensor | None = None
    within: tuple[float, float] = (0.0, 1.0)


# (z (B, C, h, w), t (B,), text, guidance (B,)) -> v (B, C, h, w)
Velocity = Callable[[Tensor, Tensor, Text, Tensor], Tensor]
# shape (C, h, w) of a latent -> how its draws are distributed: the shift may depend on the number of tokens
SamplingOf = Callable[[Sequence[int]], Sampling]


@dataclass(frozen=True)
class Draws:
    """The random part of a batch: eps (B, C, h, w); t, guidance (B,) float32; dropped (B,) bool."""

    eps: Tensor
    t: Tensor
    guidance: Tensor
    dropped: Tensor


# for every batch, for every quantile of t: (mean loss, t, samples)
Figures = list[list[tuple[float, float, int]]]
LossOf = Callable[[Tensor, Text, Draws], Tensor]  # (z0 (B, C, h, w), text, draws) -> mean loss over the samples, scalar


def draw(
    seed: int, step: int, samples: Sequence[int], shape: Sequence[int], sampling: Sampling, stream: int = TRAINING
) -> Draws:
    """Draws of the samples at positions ``samples`` of the global batch of ``step``; ``shape`` is (C, h, w).

    Every sample has its own counter-based generator (Philox, Salmon et al. 2011) keyed by (seed, stream, step,
    position), so the numbers do not depend on how the batch is split over micro-batches and ranks, nor on what was
    drawn before.
    """
    eps, normal, uniform = [], [], []
    for sample in samples:
        generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, sample, step]))
        normal.append(generator.standard_normal())
        uniform.append(generator.random(2))
        eps.append(generator.standard_normal(tuple(shape), dtype=np.float32))
    levels, drops = torch.from_numpy(np.stack(uniform)).unbind(1)
    low, high = sampling.guidance_range
    return Draws(
        eps=torch.from_numpy(np.stack(eps)),
        t=t_of_normal(torch.tensor(normal, dtype=torch.float64), sampling),
        guidance=(low + (high - low) * levels).float(),
        dropped=drops < sampling.text_drop,
    )


def draw_evaluation(seed: int, number: int, samples: Sequence[int], shape: Sequence[int], sampling: Sampling) -> Draws:
    """Draws of held-out samples at quantile ``number`` of t, under a random stream of their own; no text is dropped."""
    drawn = draw(seed, number, samples, shape, sampling, EVALUATION)
    t = t_of_normal(torch.special.ndtri(torch.tensor(QUANTILES[number], dtype=torch.float64)), sampling)
    return Draws(drawn.eps, t.expand(len(samples)), drawn.guidance, torch.zeros_like(drawn.dropped))


def t_of_normal(normal: Tensor, sampling: Sampling) -> Tensor:
    """Noise level of a standard normal draw: shifted sigmoid, or the DDPM step at the same quantile; float32.

    Where only a part of the noise levels is drawn, their distribution is the same, cut to that part: the draw at
    quantile u becomes the one at F(low) + u (F(high) - F(low)), where F tells the quantile of a noise level.
    """
    if sampling.kind == "ddpm":
        assert sampling.times is not None, "a DDPM schedule has its noise levels"
        steps = len(sampling.times)
        index = (torch.special.ndtr(normal) * steps).long().clamp(0, steps - 1)
        return sampling.times.to(torch.float32)[index]
    if sampling.within != (0.0, 1.0):
        low, high = sampling.within
        ends = shift_t(torch.tensor([low, high], dtype=torch.float64), 1 / sampling.shift).clamp(0, 1)  # 1 is rounded
        start, end = torch.special.ndtr(torch.logit(ends))
        normal = torch.special.ndtri(start + torch.special.ndtr(normal) * (end - start))
        return shift_t(torch.sigmoid(normal), sampling.shift).float().clamp(low, high)
    return shift_t(torch.sigmoid(normal), sampling.shift).float()


def shift_t(t: Tensor, shift: float) -> Tensor:
    """t' = r t / (1 + (r - 1) t) (arXiv 2509.25180)."""
    return shift * t / (1 + (shift - 1) * t)


def noised(z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t eps; t is (B,)."""
    t = per_row(t, z0)
    return (1 - t) * z0 + t * eps


def mean_per_row(error: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return error.mean(dim=tuple(range(1, error.ndim)))


class Resident:
    """A condition of one row that is sent to a device once: it stays there for the passes to come."""

    def __init__(self, text: Text) -> None:
        self._text = text

    def on(self, device: torch.device) -> Text:
        self._text = {key: value.to(device) for key, value in self._text.items()}
        return self._text


def drop_text(text: Text, null: Text, dropped: Tensor) -> Text:
    """``text`` with the null condition (batch of one) in the dropped samples; ``dropped`` is (B,) bool.

    What the null condition does not name stays: a dropped sample keeps its reference, as the pipelines do. Where the
    text encoder sees the reference, every sample brings a null condition of its own (`base.NULL`).
    """
    null = {key: value.to(text[key].device, text[key].dtype) for key, value in null.items()}
    null |= {key.removeprefix(NULL): value for key, value in text.items() if key.startswith(NULL)}
    return {
        key: torch.where(per_row(dropped, value), null[key], value) if key in null else value
        for key, value in text.items()
    }


def predict(family: Family, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor) -> Tensor:
    """The network's native prediction in its own dtype's arithmetic, (B, C, h, w) float32."""
    return family.predict(model, z.to(model.dtype), t, in_dtype(text, model.dtype), guidance).float()


def velocity(family: Family, model: Network, z: Tensor, t: Tensor, text: Text, guidance: Tensor) -> Tensor:
    """The network's v = eps - z_0 in its own dtype's arithmetic, (B, C, h, w) float32."""
    return family.velocity(model, z.to(model.dtype), t, in_dtype(text, model.dtype), guidance).float()


def in_dtype(text: Text, dtype: torch.dtype) -> Text:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in text.items()}


def flow_loss(
    family: Family, model: Network, z0: Tensor, text: Text, draws: Draws, null: Text, weighting: str = "none"
) -> Tensor:
    """Mean squared error of the family's native prediction: w || e(z_t, t, c) - target ||^2; scalar. w:
    `error_weight`.
    """
    z = noised(z0, draws.eps, draws.t)
    prediction = predict(family, model, z, draws.t, drop_text(text, null, draws.dropped), draws.guidance)
    error = mean_per_row((prediction - family.target(z0, draws.eps)).square())
    return (error_weight(family, draws.t, weighting) * error).mean()


def nothing_loss(family: Family, z0: Tensor, text: Text, draws: Draws, *, weighting: str = "none") -> Tensor:  # noqa: ARG001
    """`flow_loss` of a network whose prediction is zero everywhere, w || target ||^2; of the corrected loss too.

    A start above it is that of a network whose embedder and head do not belong to its blocks.
    """
    return (error_weight(family, draws.t, weighting) * mean_per_row(family.target(z0, draws.eps).square())).mean()


def error_weight(family: Family, t: Tensor, weighting: str) -> Tensor:
    """Weight of a squared error of the native prediction at t, (B,): 1, but min(25, 1 / abar) of an epsilon with
    "velocity", and `bell` with "bell".

    1 / abar, at the DDPM level of t, makes it the error of DDPM's v (arXiv 2202.00512). Plain epsilon error hardly
    counts heavy noise, in which the layout of a picture is decided: there a network that repeats its input is nearly
    right.
    """
    if weighting == "bell":
        return bell(t)
    if weighting == "none" or family.prediction != "epsilon":
        return torch.ones_like(t)
    return (1 + (t / (1 - t)).square()).clamp(max=25)


def bell(t: Tensor) -> Tensor:
    """[exp(-2 (t - 1/2)^2) - exp(-1/2)] / m, (B,): 0 at both ends, highest at 1/2, with the mean 1 over all of [0, 1].

    The DC-Gen authors train Wan with this weight (their code, from DiffSynth). They give it the mean 1 over their
    levels of t instead: another m, which is one factor for the whole loss.
    """
    lowest = math.exp(-0.5)
    mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - lowest
    return ((-2 * (t - 0.5).square()).exp() - lowest) / mean


def guidance_corrected_loss(
    family: Family,
    model: Network,
    z0: Tensor,
    text: Text,
    draws: Draws,
    null: Text,
    null_branch: Callable[[], AbstractContextManager[None]] = nullcontext,
    data_guidance: float = 1.0,
) -> Tensor:
    """|| v(null) + (g_d / g) [v_g(c) - v(null)] - v ||^2 for guidance-distilled networks; scalar.

    With g_d = ``data_guidance`` = 1 it is the published loss, || [v_g(c) - (1 - g) v(null)] / g - v ||^2 (arXiv
    2509.25180).

    v(null) is taken at g = 1, without gradient, inside ``null_branch``: as it is, that is the current student; a
    context that switches the adapter off makes it the frozen teacher.
    """
    z = noised(z0, draws.eps, draws.t)
    with torch.no_grad(), null_branch():
        nothing = drop_text(text, null, torch.ones_like(draws.dropped))
        v_null = predict(family, model, z, draws.t, nothing, torch.ones_like(draws.guidance))
    v_g = predict(family, model, z, draws.t, drop_text(text, null, draws.dropped), draws.guidance)
    return corrected_error(v_g, v_null, draws.guidance, data_guidance, family.target(z0, draws.eps))


def corrected_error(v_g: Tensor, v_null: Tensor, guidance: Tensor, data_guidance: float, v: Tensor) -> Tensor:
    """|| v(null) + (g_d / g) [v_g - v(null)] - v ||^2; velocities (B, C, h, w), guidance (B,); scalar."""
    return (corrected(v_g, v_null, guidance, data_guidance) - v).square().mean()


def corrected(guided: Tensor, null: Tensor, guidance: Tensor, data_guidance: float) -> Tensor:
    """null + (g_d / g) (guided - null), (B, ...): v_hat of velocities, or the features that a linear head makes it
    from.
    """
    return null + data_guidance / per_row(guidance, null) * (guided - null)


def consistency_loss(
    family: Family, model: Network, z0: Tensor, text: Text, draws: Draws, null: Text, teacher: Velocity, ratio: float
) -> Tensor:
    """|| v(z_t, t) - [z_t - f(z_r, r)] / t ||^2 with the guess of the picture f(z, t) = z - t v(z, t), r = ``ratio`` t;
    scalar.

    Consistency distillation (arXiv 2303.01469, eq. 7): z_r = z_t + (r - t) v is one Euler step of ``teacher``, and
    f(z_r, r) the student's own guess, without gradient. At ratio 0 the target is the teacher's v. In the limit of 1 the
    student's first guess is where the teacher's many steps end.

    Args:
        teacher: (z, t, text, guidance) -> v; what the model was when the phase began.
    """
    z, text, t = noised(z0, draws.eps, draws.t), drop_text(text, null, draws.dropped), draws.t
    t_, r_ = per_row(t, z), ratio * per_row(t, z)
    with torch.no_grad():
        z_r = z + (r_ - t_) * teacher(z, t, text, draws.guidance)
        guess = z_r - r_ * velocity(family, model, z_r, ratio * t, text, draws.guidance)
    return (velocity(family, model, z, t, text, draws.guidance) - (z - guess) / t_).square().mean()


@torch.no_grad()
def evaluate_loss(
    loss_of: LossOf,
    batches: Sequence[tuple[Sequence[int], Tensor, Text]],
    seed: int,
    sampling: SamplingOf,
    device: torch.device | str = "cpu",
    combine: Callable[[Figures], Figures] = lambda own: own,
) -> dict[str, float]:
    """Loss on held-out samples at fixed quantiles of t, under a random stream of its own.

    Args:
        loss_of: (z0, text, draws) -> mean loss over the batch.
        batches: (positions, z0, text), each of one shape; the positions key the noise, so two evaluations see the same
            noise.
        sampling: shape (C, h, w) -> how draws are distributed; its quantiles of t are those of that shape.
        combine: figures of this rank's batches -> those of all ranks' batches, always in the same order, so that the
            sums are rounded alike.
    Returns:
        {"t0.12": loss at t = 0.12 (the mean over the samples), ..., "mean": their mean}.
    """
    levels: list[list[float]] = [[] for _ in batches]
    losses: list[Tensor] = []
    for number in range(len(QUANTILES)):
        for found, (positions, z0, text) in zip(levels, batches, strict=True):
            drawn = draw_evaluation(seed, number, positions, z0.shape[1:], sampling(z0.shape[1:]))
            found.append(drawn.t[0].item())
            losses.append(loss_of(*to_device((z0, text, drawn), device)))
    read = torch.stack(losses).tolist() if losses else []  # at the end: the host does not wait after every batch
    own: Figures = [
        [(loss, t, len(z0)) for loss, t in zip(read[place :: len(batches)], levels[place], strict=True)]
        for place, (_, z0, _) in enumerate(batches)
    ]
    result: dict[str, float] = {}
    for quantile in zip(*combine(own), strict=True):
        count = sum(size for _, _, size in quantile)
        level = sum(size * t for _, t, size in quantile) / count
        result[f"t{level:.2f}"] = sum(size * loss for loss, _, size in quantile) / count
    return {**result, "mean": sum(result.values()) / len(result)}


def to_device(batch: tuple[Tensor, Text, Draws], device: torch.device | str) -> tuple[Tensor, Text, Draws]:
    """The batch on ``device``, copied asynchronously where possible."""
    z0, text, draws = batch

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return (
        move(z0),
        {key: move(value) for key, value in text.items()},
        Draws(*(move(value) for value in vars(draws).values())),
    )
