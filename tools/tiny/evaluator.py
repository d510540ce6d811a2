"""Train the evaluator of the tiny world with drawn pictures. A little blur and noise make it judge the content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dcgen_convert.tiny import world
from dcgen_convert.tiny.evaluator import Evaluator

FILE = "evaluator.safetensors"


def train(steps: int, batch: int, seed: int, log: Callable[[str], None] = print) -> Evaluator:
    """A new evaluator, trained for ``steps`` steps of ``batch`` pictures."""
    torch.manual_seed(seed)
    model = Evaluator().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        labels = world.sample_labels(batch, 10_000_000 + step)
        pictures = world.draw(labels, 10_000_000 + step)
        if step % 2:
            pictures = F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
        pictures = pictures + 0.03 * torch.randn_like(pictures)
        losses = [F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(model(pictures))]
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            log(f"evaluator step {step} loss {sum(x.item() for x in losses):.4f}")
    return model.eval()


def save(model: Evaluator, work: Path) -> None:
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, work / FILE)


def load(work: Path) -> Evaluator:
    model = Evaluator()
    model.load_state_dict(load_file(work / FILE))
    return model.eval()
