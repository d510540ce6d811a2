"""PRX's stock pipeline of diffusers 0.42 fails with guidance and several prompts: each has a call of its own."""

import pytest
import torch

from dcgen_convert.bundle import sample
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.networks import pipelines

from .tiny_models import TINY


@torch.no_grad()
def test_several_prompts_are_drawn_as_each_alone(tmp_path):
    TINY["prx"].build(tmp_path)
    source = load_source("prx", str(tmp_path))
    pipeline, family = pipelines.load_pipeline(source, torch.float32), source.family
    prompts, seeds, settings = ["a fox", "a big blue cat"], [1, 2], dict(steps=2, guidance=2.5, length=16)
    with pytest.raises(RuntimeError, match="must match"):
        pipeline(**family.pipeline_call(pipeline, prompts, height=64, width=64, **settings))
    together = pipelines.draw(family, pipeline, prompts, seeds, side=64, **settings)
    again = sample.draw_pixels(pipeline, family, prompts, seeds, height=64, width=64, **settings)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = pipelines.draw(family, pipeline, [prompt], [seed], side=64, **settings)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(again[row : row + 1] * 2 - 1, alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-2
