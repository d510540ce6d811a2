"""A small conversion whose three phases have pictures of their own: drawn, the user's, and drawn otherwise."""

from pathlib import Path

import torch

from dcgen_convert.data.images import to_image

PHASE = "mode: lora, steps: 3, rank: 4, lr: 1.0e-3, warmup: 1, schedule: constant, batch: 4"
RECIPE = f"""
extends: tiny-flux
name: three
data: {{count: 6, steps: 1}}
latents: {{scale_tolerance: 100}}
align_head: {{steps: 0, draws: 1}}
adapt:
  phases:
    - {{{PHASE}, resolution: 64, data: {{count: 8, resolution: 64}}}}
    - {{{PHASE}, resolution: 128, data: {{path: pictures, count: 20}}}}
    - {{{PHASE}, resolution: 128, data: {{count: 10, guidance: 1}}}}
bundle: {{steps: 1}}
evaluate: {{prompts: 0, metrics: none}}
"""
SMALL, PICTURES = "0.png", 7  # of the user's: the first is too small for 128 px


def write(folder: Path) -> Path:
    """Write the pictures and the recipe into ``folder``; the file of the recipe."""
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        add(folder, number, 64 if number == 0 else 128)
    (folder / "three.yaml").write_text(RECIPE)
    return folder / "three.yaml"


def add(folder: Path, number: int, side: int = 128) -> None:
    """One more of the user's pictures."""
    pixels = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(number)) * 2 - 1
    pixels = pixels.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)
    to_image(pixels).save(folder / "pictures" / f"{number}.png")
    (folder / "pictures" / f"{number}.txt").write_text(f"a small red circle, number {number}")
