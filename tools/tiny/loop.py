"""The loop that trains a miniature. It writes where it is to a file, and goes on from there when it runs again."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcgen_convert.families.base import Network
from dcgen_convert.train.orthogonal import MOMENTUM, step_of

Log = Callable[[str], None]
EVERY = 120  # seconds between two writes of the state
INNER = ("block", "stages")  # parts of the names of layers that are neither the first nor the last


@dataclass(frozen=True)
class Training:
    """Length, batch, learning rate and seed of one training. ``shift`` moves the noise levels towards heavy noise.

    half: the network runs in bfloat16, its weights stay in float32. A transformer is a fifth faster, convolutions over
        frames are three times as fast.
    orthogonal: the matrices of the blocks take orthogonal steps (Muon), three times as large as a usual AdamW step.
    """

    steps: int
    batch: int
    lr: float
    seed: int
    shift: float = 1.0
    half: bool = False
    orthogonal: bool = False


class Orthogonal(torch.optim.Optimizer):
    """The orthogonal steps of `train.orthogonal`, of whole matrices. A convolution counts as (out, in * kernel)."""

    def __init__(self, matrices: list[Tensor] | list[dict[str, Any]], lr: float, weight_decay: float):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002  torch passes it
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                moment = state.setdefault("moment", torch.zeros_like(weight)).mul_(MOMENTUM).add_(weight.grad)
                direction = weight.grad.add(moment, alpha=MOMENTUM).flatten(1)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(step_of(direction).view_as(weight), alpha=-group["lr"])


def state_of(work: Path, part: str, number: int) -> Path:
    """File of the state of phase ``number`` of a part. That of a phase that is done says so, and is kept."""
    return work / f"{part}-phase-{number}.state"


def optimise(
    model: Network,
    loss_of: Callable[[torch.Generator], Tensor],
    training: Training,
    log: Log = print,
    state: Path | None = None,
) -> Network:
    """AdamW or Muon with warm-up and cosine decay. Returns the exponential moving average of the weights.

    Args:
        state: file that the training goes on from if it is there, and that it is written to every two minutes and at
            the end. All random numbers must come from the generator that ``loss_of`` gets.
    """
    steps = training.steps
    # eval(): in training mode the LabelEmbedding of diffusers would drop labels in each block separately.
    model.eval().requires_grad_(True)
    optimizers = optimizers_of(model, training)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1, (s + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps)))
        )
        for optimizer in optimizers
    ]
    ema = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(training.seed)
    parts = [model, ema, *optimizers, *schedules]
    first = _read(state, parts, generator) if state and state.exists() else 0
    if first:
        log(f"goes on from step {first}")
    started = written = time.time()
    window: list[float] = []
    for step in range(first, steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=training.half):
            loss = loss_of(generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        window.append(loss.item())
        if step % 100 == 99 or step == steps - 1:
            mean, seconds = sum(window) / len(window), (time.time() - started) / (step + 1 - first)
            log(f"step {step + 1} loss {mean:.4f} {seconds:.3f} s/step")
            window.clear()
        if state and (time.time() - written > EVERY or step == steps - 1):
            _write(state, step + 1, parts, generator)
            written = time.time()
    return ema


def optimizers_of(model: Network, training: Training) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or for all but the matrices of the blocks."""
    matrices, rest = [], []
    for name, weight in model.named_parameters():
        matrix = weight.ndim > 1 and min(weight.flatten(1).shape) > 1
        chosen = training.orthogonal and matrix and any(part in name for part in INNER)
        (matrices if chosen else rest).append(weight)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=training.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    ]
    if matrices:
        optimizers.append(Orthogonal(matrices, lr=training.lr, weight_decay=1e-3))
    return optimizers


def _write(file: Path, step: int, parts: list[Any], generator: torch.Generator) -> None:
    held = {"step": step, "parts": [part.state_dict() for part in parts], "generator": generator.get_state()}
    new = file.with_suffix(".new")
    torch.save(held, new)
    os.replace(new, file)


def _read(file: Path, parts: list[Any], generator: torch.Generator) -> int:
    """Put the state back; the steps that were done."""
    held = torch.load(file, weights_only=True)
    for part, state in zip(parts, held["parts"], strict=True):
        part.load_state_dict(state)
    generator.set_state(held["generator"])
    return int(held["step"])
