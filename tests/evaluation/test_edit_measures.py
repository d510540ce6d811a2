"""Measures of edits of any pictures, against the networks called by hand and against formulas."""

from __future__ import annotations

import math

import pytest
import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation import measures, rows
from dcgen_convert.evaluation.edit_measures import NEUTRAL
from dcgen_convert.evaluation.measures import Weights
from dcgen_convert.evaluation.metrics import psnr
from dcgen_convert.evaluation.pixels import to_images

from .test_networks_of_measures import clip_folder, dino_folder, one, pictures_of  # noqa: F401  fixtures

TEXTS = ["make it red", "make it striped", "do nothing"]


@pytest.fixture(scope="module")
def pair():
    """(edited pictures, what was edited) of three scenes each; the last did not change."""
    pictures, sources = pictures_of(3, 3), pictures_of(3, 8)
    pictures[2] = sources[2]
    return pictures, sources


def scored(name, weights, pair, texts=TEXTS):
    chosen = measures.chosen([name], weights, texts, edited=True)[0]
    figures = rows.measured([(pair[0], texts, pair[1])], chosen)
    return figures.scores[name]


def test_the_direction_is_that_of_the_librarys_embeddings(clip_folder, pair):  # noqa: F811
    """One by one, with transformers' own processor."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPImageProcessorPil.from_pretrained(clip_folder)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)

    @torch.no_grad()
    def of_picture(pixels):
        shown = processor(images=to_images(pixels[None]), return_tensors="pt")
        return torch.nn.functional.normalize(model.get_image_features(**shown).pooler_output.double(), dim=-1)[0]

    @torch.no_grad()
    def of_text(text):
        found = model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output
        return torch.nn.functional.normalize(found.double(), dim=-1)[0]

    found = scored("clip-direction", Weights(clip=str(clip_folder)), pair)
    for place in range(2):
        shown = of_picture(pair[0][place]) - of_picture(pair[1][place])
        asked = of_text(TEXTS[place]) - of_text(NEUTRAL)
        wanted = (shown @ asked / (shown.norm() * asked.norm())).item()
        assert found[place].item() == pytest.approx(wanted, abs=1e-4)
    assert found[2] == 0 and found.dtype == torch.float64  # nothing changed
    back = scored("clip-direction", Weights(clip=str(clip_folder)), pair[::-1])
    torch.testing.assert_close(back, -found, atol=1e-6, rtol=0)


def test_likeness_to_the_source_is_the_cosine_of_class_tokens(dino_folder, pair):  # noqa: F811
    features = one("fd-dinov2", Weights(dino=str(dino_folder))).features
    a, b = features(pair[0]).double(), features(pair[1]).double()
    wanted = [(x @ y / (x.norm() * y.norm())).item() for x, y in zip(a, b, strict=True)]
    found = scored("dino-source", Weights(dino=str(dino_folder)), pair)
    assert found.tolist() == pytest.approx(wanted, abs=1e-6) and found[2] == pytest.approx(1)


def test_where_nothing_was_asked_for_the_picture_stays(pair):
    texts = ["Do nothing.", "make it red", "keep the picture as it is"]
    found = scored("unchanged", Weights(), pair, texts)
    assert found[0].item() == pytest.approx(psnr(pair[0][0], pair[1][0], peak=2.0), rel=1e-5)
    assert math.isnan(found[1]) and found[2].item() == pytest.approx(58.92, abs=0.01)


def test_measures_of_edits_need_edits_and_captions_need_none(clip_folder, dino_folder):  # noqa: F811
    both = Weights(clip=str(clip_folder), dino=str(dino_folder))
    found, left_out = measures.chosen(None, both, TEXTS, edited=True)
    assert {"clip-direction", "dino-source", "unchanged", "cmmd"} <= {measure.name for measure in found}
    assert "an instruction does not say what the picture shows" in left_out["clip"]
    found, left_out = measures.chosen(None, both, TEXTS)
    assert not {"clip-direction", "dino-source", "unchanged"} & {measure.name for measure in found}
    with pytest.raises(InputError, match="unchanged cannot be used: no instruction is one of 'do nothing'"):
        measures.chosen(["unchanged"], both, ["make it red"], edited=True)
    with pytest.raises(InputError, match="clip cannot be used: an instruction does not say"):
        measures.chosen(["clip"], both, ["make it red"], edited=True)
