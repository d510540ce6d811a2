"""How well a model edits pictures of the tiny world: edit accuracy and preservation, attribute by attribute.

The stock FluxKontextPipeline edits newly drawn pictures by instructions. Then it edits "no picture": the latent of the
reference is zero everywhere. What the edits then still keep of the source is chance.

    PYTHONPATH=. python tests/benchmarks/editing.py FOLDER [--count 256] [--steps 12] [--guidance 2.5]

FOLDER is a pipeline with an AutoencoderKL, such as dcgen_convert/tiny/weights/tiny-kontext.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from dcgen_convert.evaluation import tiny_edits
from dcgen_convert.tiny import edits, world

SEED, BATCH, LENGTH = 90_017, 32, 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=2.5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = FluxKontextPipeline.from_pretrained(asked.folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    sample = edits.sample(asked.count, SEED)
    sources, _ = edits.draw(sample, SEED)
    print(f"| {asked.count} edits | edit accuracy | preservation | {' | '.join(world.ATTRIBUTES)} |", flush=True)
    print(f"|---|---|---|{'---|' * len(world.ATTRIBUTES)}")
    channels, side = pipeline.vae.config.latent_channels, world.SIDE // pipeline.vae_scale_factor
    nothing = torch.zeros(len(sources), channels, side, side)
    for title, references in (("of the picture", sources), ("of a reference of zeros", nothing)):
        pictures = edited(pipeline, references, sample.instructions, asked.steps, asked.guidance)
        right = tiny_edits.changed(pictures, sample.instructions)
        kept = tiny_edits.kept(pictures, sources, sample.instructions)
        cells = [
            f"{right[sample.column == column].mean():.1%} / {kept[:, column].nanmean():.1%}"
            for column in range(len(world.ATTRIBUTES))
        ]
        print(f"| {title} | {right.mean():.1%} | {kept.nanmean(1).mean():.1%} | {' | '.join(cells)} |", flush=True)


def edited(
    pipeline: FluxKontextPipeline, references: Tensor, instructions: list[str], steps: int, guidance: float
) -> Tensor:
    """Edited pictures (B, 3, SIDE, SIDE) in [-1, 1], from pictures in [-1, 1] or from their latents."""
    parts = []
    for start in range(0, len(instructions), BATCH):
        rows = slice(start, start + BATCH)
        given = references[rows]
        pixels = pipeline(
            image=(given + 1) / 2 if given.shape[1] == 3 else given,
            prompt=instructions[rows],
            height=world.SIDE,
            width=world.SIDE,
            max_area=world.SIDE**2,  # of itself the pipeline draws about a megapixel
            _auto_resize=False,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=LENGTH,
            generator=[torch.Generator().manual_seed(SEED + start + i) for i in range(len(given))],
            output_type="pt",
        ).images
        parts.append(pixels * 2 - 1)
    return torch.cat(parts)


if __name__ == "__main__":
    main()
