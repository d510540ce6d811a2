"""The shipped base models draw what their captions say: weights, text encoders and tokenizers belong together."""

from __future__ import annotations

import pytest
import torch

from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.data import prompts
from dcgen_convert.evaluation import tiny_world
from dcgen_convert.families.catalog import find_source
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe import loading
from dcgen_convert.stages.captions import class_names

COUNT = 48


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-sana", "tiny-dit"])
def test_nine_attributes_of_ten_are_right(name):
    source = load_source(name, str(find_source(name).folder))
    data = loading.load(name).recipe.data
    texts = prompts.make("tiny-world", COUNT, 77, class_names(source))
    pictures = pipelines.draw(
        source.family,
        pipelines.load_pipeline(source, torch.float32),
        texts,
        range(COUNT),
        side=data.resolution,
        steps=data.steps,
        guidance=data.guidance,
        length=16,
    )
    assert tiny_world.accuracy(pictures, texts) >= 0.9
    # and the judge does not say yes to everything
    assert tiny_world.accuracy(pictures, texts[1:] + texts[:1]) <= 0.55
