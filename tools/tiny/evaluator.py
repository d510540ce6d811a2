"""Train the evaluators of the tiny world with drawn pictures and videos.

A little blur and noise make them judge the content.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcgen_convert.tiny import videos, world
from dcgen_convert.tiny.evaluator import Evaluator
from dcgen_convert.tiny.motion import MotionEvaluator

FILE = "evaluator.safetensors"
MOTION = "motion.safetensors"


def train(steps: int, batch: int, seed: int, log: Callable[[str], None] = print) -> Evaluator:
    """A new evaluator, trained for ``steps`` steps of ``batch`` pictures."""
    torch.manual_seed(seed)
    model = Evaluator().train()

    def loss_of(step: int) -> Tensor:
        labels = world.sample_labels(batch, 10_000_000 + step)
        pictures = world.draw(labels, 10_000_000 + step)
        if step % 2:
            pictures = _blurred(pictures)
        pictures = pictures + 0.03 * torch.randn_like(pictures)
        return torch.stack([F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(model(pictures))]).sum()

    _fit(model, loss_of, steps, log)
    return model.eval()


def train_motion(steps: int, batch: int, seed: int, log: Callable[[str], None] = print) -> MotionEvaluator:
    """A new evaluator of motion, trained for ``steps`` steps of ``batch`` videos, which begin and end at any moment."""
    torch.manual_seed(seed)
    model = MotionEvaluator().train()

    def loss_of(step: int) -> Tensor:
        labels = videos.sample_labels(batch, 20_000_000 + step)
        first, last = -0.5 + 0.1 * torch.rand(1).item(), 0.5 - 0.35 * torch.rand(1).item()
        moments = (first, (first + last) / 2, last)
        frames = [videos.frame(labels, 20_000_000 + step, moment) for moment in moments]
        clips = torch.stack([_blurred(one) for one in frames] if step % 2 else frames, dim=2)
        return F.cross_entropy(model(clips + 0.06 * torch.randn_like(clips)), labels[:, -1])

    _fit(model, loss_of, steps, log)
    return model.eval()


def _blurred(pictures: Tensor) -> Tensor:
    return F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)


def _fit(model: nn.Module, loss_of: Callable[[int], Tensor], steps: int, log: Callable[[str], None]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            log(f"{type(model).__name__} step {step} loss {loss.item():.4f}")


def save(model: nn.Module, file: Path) -> None:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)


def load(work: Path) -> Evaluator:
    model = Evaluator()
    model.load_state_dict(load_file(work / FILE))
    return model.eval()


def load_motion(work: Path) -> MotionEvaluator:
    model = MotionEvaluator()
    model.load_state_dict(load_file(work / MOTION))
    return model.eval()
