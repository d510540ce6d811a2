"""Prompts of a class-conditional model: numbers and labels are drawn, other texts are refused in one sentence."""

import pytest

from dcgen_convert.bundle.loading import load
from dcgen_convert.bundle.sample import draw_pixels
from dcgen_convert.core.errors import InputError


def test_a_text_that_is_no_class_is_refused_by_name(parts, bundles):
    pipeline, _ = load(bundles("dit"))
    family, side = parts("dit").family, parts("dit").side
    settings = {"height": side, "width": side, "steps": 1, "guidance": 1.0, "length": 1}

    def draw(prompt):
        return draw_pixels(pipeline, family, [prompt], [0], **settings)

    assert draw("7").equal(draw("fox")) and not draw("7").equal(draw("trout"))
    for wrong in ("a red circle", "1001", "-1"):
        with pytest.raises(InputError, match=f"the caption '{wrong}' is no class of the model"):
            draw(wrong)
