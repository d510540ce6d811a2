"""The shipped base models draw what their captions say: weights, text encoders and tokenizers belong together."""

from __future__ import annotations

import pytest
import torch

from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.data import prompts
from dcgen_convert.evaluation import tiny_edits, tiny_world
from dcgen_convert.families.catalog import find_source
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe import loading
from dcgen_convert.stages.captions import class_names
from dcgen_convert.tiny import edits

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


def test_the_model_that_edits_changes_one_attribute_and_keeps_the_rest():
    source = load_source("tiny-kontext", str(find_source("tiny-kontext").folder))
    data = loading.load("tiny-kontext").recipe.data
    asked = edits.sample(COUNT, 77)
    sources, _ = edits.draw(asked, 77)
    pictures = pipelines.draw(
        source.family,
        pipelines.load_pipeline(source, torch.float32),
        asked.instructions,
        range(COUNT),
        side=data.resolution,
        steps=data.steps,
        guidance=data.guidance,
        length=16,
        references=[[picture] for picture in sources],
    )
    assert tiny_edits.changed(pictures, asked.instructions).mean() >= 0.85
    assert tiny_edits.kept(pictures, sources, asked.instructions).nanmean() >= 0.9
    # of other sources it keeps no more than chance
    assert tiny_edits.kept(pictures, sources.roll(1, 0), asked.instructions).nanmean() <= 0.5
