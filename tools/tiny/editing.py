"""What tiny-kontext is trained with: edits of the tiny world. It goes on from tiny-flux, with a second picture.

The tokens of the reference stand behind those of the target, and go through the same embedder. Their position ids begin
with 1 (those of the target with 0), as in FLUX.1 Kontext. What the network writes at them is left out.
B batch, C latent channels, h w latent grid; z_t = (1 - t) z_0 + t eps, the reference has no noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dcgen_convert import families
from dcgen_convert.families.base import REFERENCE, Pipeline, Text
from dcgen_convert.tiny import edits
from tools.tiny import transformers as base

SHAPES = 3  # how often each edit of a shape stands in the pairs: shapes are learned last


@dataclass
class EditPairs(base.Pairs):
    """Edited pictures with the conditions of their instructions, and the pictures that they were made from."""

    reference: Tensor  # (S, C, h, w)

    def batch(self, index: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Text]:
        """As of other pairs. The condition holds the reference too, which is never dropped."""
        z, text = super().batch(index, drop)
        return z, {**text, REFERENCE: self.reference[index]}


@torch.no_grad()
def pairs(pipeline: Pipeline, count: int, seed: int, length: int, log: base.Log = print) -> EditPairs:
    """Edits of ``count`` / 2 pairs of pictures: each pair is used in both directions.

    Args:
        pipeline: with text encoders and the autoencoder, in float32.
        length: text tokens to which instructions are padded.
    """
    family, there = families.get("flux-kontext"), edits.sample(count // 2, seed)
    before, after = (base.encode_pictures(pipeline.vae, labels, seed) for labels in (there.before, there.after))
    texts = there.instructions + there.undone.instructions
    known = {text: row for row, text in enumerate(sorted(set(texts)))}
    table, null = (family.encode_text(pipeline, prompts, length) for prompts in (list(known), [""]))
    shapes = torch.cat([there.column, there.column]) == edits.COLUMNS.index("shape")
    often = torch.arange(len(texts)).repeat_interleave(torch.where(shapes, SHAPES, 1))
    log(f"{len(often)} edits, latents {tuple(before.shape[1:])}, {len(known)} instructions")
    z, reference = torch.cat([after, before])[often], torch.cat([before, after])[often]
    return EditPairs(z, torch.tensor([known[text] for text in texts])[often], table, null, reference)
