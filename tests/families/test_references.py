"""Models that edit: which family they are, and what becomes of the picture that they are given.

N tokens of the target, M of the reference.
"""

import pytest
import torch

from dcgen_convert import families
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.families.base import REFERENCE
from dcgen_convert.networks import models
from dcgen_convert.planning import plan
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.planning.speed import speedup
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.loading import load
from dcgen_convert.train.objective import Sampling, draw, drop_text, guidance_corrected_loss

from .tiny_models import TINY

KONTEXT = families.get("flux-kontext")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kontext") / "source"
    TINY["flux-kontext"].build(folder)
    return folder


@pytest.fixture(scope="module")
def model(source):
    return models.load(source / "transformer", torch.float32)


def inputs(count=2):
    """(z, t, text, guidance): targets of 16 tokens, references of 6."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(count, *shape, generator=generator)

    text = {"encoder_hidden_states": random(5, 16), "pooled_projections": random(16), REFERENCE: random(4, 4, 6)}
    return random(4, 8, 8), torch.full((count,), 0.4), text, torch.full((count,), 2.0)


def test_only_the_pipeline_tells_kontext_from_flux(source):
    found = load_source("mine", str(source))
    assert found.family is KONTEXT and Identity(str(source)).family is KONTEXT
    assert families.recognise(found.config).name == "flux"
    assert families.recognise(found.config, {"_class_name": "FluxPipeline"}).name == "flux"


def test_a_file_of_kontext_is_told_by_the_base_that_completes_it(source, tmp_path):
    file = next((source / "transformer").glob("*.safetensors"))
    found = load_source("mine", str(file), base=str(source), home=tmp_path)
    assert found.family is KONTEXT and Identity(str(file), base=str(source)).family is KONTEXT


def test_swapped_references_swap_the_predictions(model):
    z, t, text, g = inputs(1)
    z, t, g = (value.expand(2, *value.shape[1:]) for value in (z, t, g))
    text = {key: value.expand(2, *value.shape[1:]) for key, value in text.items()}
    pair = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one = KONTEXT.predict(model, z, t, text | {REFERENCE: pair}, g)
        other = KONTEXT.predict(model, z, t, text | {REFERENCE: pair.flip(0)}, g)
    assert (one[0] - one[1]).abs().max() > 1e-3
    torch.testing.assert_close(other, one.flip(0), atol=1e-6, rtol=1e-6)


def test_a_reference_of_the_same_numbers_on_another_grid_is_another_picture(model):
    """Its positions are rows and columns of its own grid."""
    z, t, text, g = inputs()
    tokens = KONTEXT.tokens(text[REFERENCE], 2)
    turned = KONTEXT.untokens(tokens, (6, 4), 2, KONTEXT.in_order)
    with torch.no_grad():
        wide, tall = (KONTEXT.predict(model, z, t, text | {REFERENCE: r}, g) for r in (text[REFERENCE], turned))
    assert (wide - tall).abs().max() > 1e-4


def test_block_maps_are_those_of_the_target(model):
    """A block whose output is exchanged at the reference's places alone gives the same map, in both kinds of blocks."""
    z, t, text, g = inputs()
    seen = {}
    for block in KONTEXT.block_modules(model):
        block.register_forward_hook(lambda module, _, output: seen.setdefault(type(module).__name__, output))
    with torch.no_grad():
        KONTEXT.predict(model, z, t, text, g)
    assert set(seen) == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
    for _, image in seen.values():
        assert image.shape[1] == 16 + 6
        found = KONTEXT.block_map((None, image), (4, 4), text)
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), image[:, :16], atol=0, rtol=0)


def test_a_dropped_text_keeps_its_reference():
    _, _, text, _ = inputs()
    null = {key: torch.zeros_like(value[:1]) for key, value in text.items() if key != REFERENCE}
    found = drop_text(text, null, torch.tensor([True, False]))
    assert torch.equal(found[REFERENCE], text[REFERENCE])
    assert not found["pooled_projections"][0].any()
    assert torch.equal(found["pooled_projections"][1], text["pooled_projections"][1])


def test_both_branches_of_the_corrected_loss_see_the_reference(model):
    """Written out: || v(null, r) + (g_d / g) [v_g(c, r) - v(null, r)] - v ||^2, all of the same reference r."""
    z0, _, text, _ = inputs()
    null = {key: torch.zeros_like(value[:1]) for key, value in text.items() if key != REFERENCE}
    drawn = draw(3, 0, [0, 1], z0.shape[1:], Sampling("logit-normal", 1.0, (1.5, 3.0), 0.0))
    zt = torch.lerp(z0, drawn.eps, drawn.t[:, None, None, None])
    empty = {key: null[key].expand_as(value) if key in null else value for key, value in text.items()}
    with torch.no_grad():
        found = guidance_corrected_loss(KONTEXT, model, z0, text, drawn, null, data_guidance=2.5)
        v_null = KONTEXT.predict(model, zt, drawn.t, empty, torch.ones(2))
        v = KONTEXT.predict(model, zt, drawn.t, text, drawn.guidance)
    hat = v_null + (2.5 / drawn.guidance)[:, None, None, None] * (v - v_null)
    torch.testing.assert_close(found, (hat - (drawn.eps - z0)).square().mean(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prompts, doubted", [("builtin", True), ("tiny-edits", False)])
def test_a_plan_says_what_a_reference_costs_and_that_captions_are_no_instructions(prompts, doubted):
    """With a reference the same network sees twice the image tokens: at 1024 px and f32 1,024 more, beside 256 of
    text.
    """
    found = plan.plan(load("flux-kontext", sets=[f"data.prompts={prompts}"]))
    assert any("prompts builtin gives captions" in note for note in found["notes"]) == doubted
    assert any("comes with a reference of its size" in note for note in found["notes"])
    sizes = [shapes_of(load(name).recipe, Identity(name)) for name in ("flux-dev", "flux-kontext")]
    assert [one.tokens(load("flux-dev").recipe.adapt.phases[-1]) for one in sizes] == [1024 + 256, 2 * 1024 + 256]
    own, edited = (speedup(one, 1024) for one in sizes)
    assert edited["flops_before"] > 1.9 * own["flops_before"] and edited["flops_after"] > 1.7 * own["flops_after"]


def test_flux_2_says_that_edits_are_not_trained_unless_they_are():
    assert "edits pictures too" in families.get("flux2").note() and not families.get("flux2").note(2)


def test_a_pipeline_that_edits_is_given_exactly_one_picture():
    pixels = torch.zeros(1, 3, 32, 32)
    assert set(KONTEXT.reference_call([pixels])) == {"image"} and families.get("flux").reference_call([]) == {}
    for family, given in ((KONTEXT, []), (KONTEXT, [pixels, pixels]), (families.get("flux"), [pixels])):
        with pytest.raises(TypeError, match="pictures for each prompt"):
            family.reference_call(given)
