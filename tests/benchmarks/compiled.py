"""Compiled blocks against plain ones: the same pictures and losses, and what a step takes.

    python tests/benchmarks/compiled.py [SOURCE, tiny-flux]

Draws eight pictures with the base model, and does five training steps with a LoRA (no DeepSpeed), both ways, from the
same random numbers. Prints the largest relative difference of pixels and gradients, the seconds of compiling,
and the ratio of the times afterwards. Bar: differences of float sums only, 1e-4 in float32.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.networks import models, pipelines
from dcgen_convert.recipe import loading
from dcgen_convert.train import lora

PICTURES, ROUNDS = 8, 5


def timed(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float, float]:
    """(result of the last round, seconds of the first, mean seconds of the others)."""
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - begun)
    return result, times[0], sum(times[1:]) / (ROUNDS - 1)


def compare(what: str, work: Callable[[], torch.Tensor], compiled: Callable[[], None]) -> None:
    plain, _, before = timed(work)
    compiled()
    new, first, after = timed(work)
    difference = ((new - plain).abs().max() / plain.abs().max()).item()
    print(f"{what}: relative difference {difference:.2g}, {before / after:.2f} x, compiled in {first - after:.0f} s")


def main(name: str = "tiny-flux") -> None:
    recipe = loading.load(name).recipe
    source = load_source(recipe.source, loading.load(name).identity.where)
    family = source.family
    pipeline = pipelines.load_pipeline(source, torch.float32)
    network = getattr(pipeline, family.component)

    def draw() -> torch.Tensor:
        texts = ["a large plain red ring"] * PICTURES if family.text_keys != ("class_labels",) else ["1"] * PICTURES
        return pipelines.draw(
            family, pipeline, texts, range(PICTURES), side=recipe.data.resolution, steps=4, guidance=2.0,
            length=recipe.latents.text_length or family.text_length,
        )  # fmt: skip

    compare("drawing", draw, lambda: models.compile_blocks(family, network))

    model = models.load(source.transformer, torch.float32)
    lora.add_lora(model, family.lora_targets, 8, 8.0, 0)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in trained:
        torch.nn.init.normal_(parameter.requires_grad_(), std=0.02, generator=torch.Generator().manual_seed(1))
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
    text = pipelines.encode_text(family, pipeline, ["a ring"] * PICTURES, family.text_length)
    cells = recipe.data.resolution // 8
    z = torch.randn(
        PICTURES, network.config.in_channels // family.patch(dict(network.config), 4) ** 2 or 4, cells, cells
    )

    def step() -> torch.Tensor:
        model.zero_grad()
        velocity = family.predict(model, z, torch.full((PICTURES,), 0.5), text, torch.full((PICTURES,), 3.5))
        loss = velocity.square().mean()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in trained])

    compare("LoRA step", step, lambda: models.compile_blocks(family, model))


if __name__ == "__main__":
    main(*sys.argv[1:])
