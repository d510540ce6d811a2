"""Qwen-Image-Edit: its text encoder sees the references, and its pipeline resizes them and guides in a way of its own.

The pipelines are tiny, and give a reference 256 x 256 px instead of a megapixel (`tiny_parts.small_references`).
"""

import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions  # before it is made small
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from dcgen_convert import families
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.pixels import to_image
from dcgen_convert.families import catalog, qwenimage_edit
from dcgen_convert.families.base import NULL, REFERENCE, reference_keys
from dcgen_convert.networks import models, pipelines
from dcgen_convert.planning import costs, plan
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.loading import load
from dcgen_convert.train.objective import drop_text

from .tiny_entry import rescaled_cfg
from .tiny_models import TINY
from .tiny_parts import reference_pixels

PLUS = families.get("qwenimage-edit-plus")
NAMES = [name for name in TINY if name.startswith("qwenimage-edit")]
LENGTH = 64


@pytest.fixture(scope="module", params=NAMES)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "source"
    TINY[request.param].build(folder)
    return load_source(request.param, str(folder))


@pytest.fixture(scope="module")
def pipeline(source):
    return pipelines.load_pipeline(source, torch.float32)


def inputs(count):
    """(z, t, text, guidance): targets of 4 x 4 tokens, references of 2 x 3."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(count, *shape, generator=generator)

    text = {"encoder_hidden_states": random(5, 16), "encoder_hidden_states_mask": torch.ones(count, 5).long()}
    return random(16, 8, 8), torch.full((count,), 0.4), text | {REFERENCE: random(16, 4, 6)}, torch.ones(count)


def test_only_the_pipeline_tells_it_from_qwen_image(source):
    assert source.family.name in NAMES and Identity(str(source.root)).family is source.family
    assert families.recognise(source.config).name == "qwenimage"
    assert families.recognise(source.config, {"_class_name": "QwenImagePipeline"}).name == "qwenimage"


@pytest.mark.parametrize("size", [(300, 200), (90, 210)], ids=str)
def test_conditions_are_those_of_the_stock_pipeline(source, pipeline, monkeypatch, size):
    """Of the prompt and of the empty one beside the same picture, whatever its shape and size; to 1e-6."""
    found, real = [], pipeline.encode_prompt
    monkeypatch.setattr(
        pipeline, "encode_prompt", lambda *args, **given: found.append(real(*args, **given)[0]) or (found[-1], None)
    )
    pixels = reference_pixels([size])
    settings = dict(side=64, steps=1, guidance=3.0, length=LENGTH)
    pipelines.draw(source.family, pipeline, ["a red fox"], [3], **settings, references=[pixels])
    monkeypatch.undo()
    given = [[to_image(pixels[0])]]
    mine = pipelines.encode_text(source.family, pipeline, ["a red fox"], LENGTH, given)
    assert len(found) == 2 and found[0].shape[1] > found[1].shape[1]
    for start, theirs in zip(("", NULL), found, strict=True):
        embeds, mask = (mine[f"{start}encoder_hidden_states{end}"] for end in ("", "_mask"))
        count = theirs.shape[1]
        assert embeds.shape[1] == source.family.condition_length(LENGTH) and mask.sum() == count
        torch.testing.assert_close(embeds[:, :count], theirs, atol=1e-6, rtol=1e-6)
        assert mask[0, :count].all() and not embeds[:, count:].any()
    others = pipelines.encode_text(source.family, pipeline, ["a red fox"], LENGTH, [[Image.new("RGB", (80, 64))]])
    assert not torch.allclose(others["encoder_hidden_states"], mine["encoder_hidden_states"], atol=1e-3)


def test_a_dropped_row_gets_the_empty_prompt_beside_its_own_picture():
    text = {key: torch.randn(3, 4) for key in ("words", f"{NULL}words", REFERENCE)}
    found = drop_text(text, {}, torch.tensor([True, False, True]))
    assert torch.equal(found["words"][[0, 2]], text[f"{NULL}words"][[0, 2]])
    assert torch.equal(found["words"][1], text["words"][1]) and torch.equal(found[REFERENCE], text[REFERENCE])


def test_swapped_references_swap_the_predictions(source):
    model = models.load(source.transformer, torch.float32)
    z, t, text, g = (
        {key: row.expand(2, *row.shape[1:]) for key, row in value.items()}
        if isinstance(value, dict)
        else value.expand(2, *value.shape[1:])
        for value in inputs(1)
    )
    pair = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other, tall = (
            source.family.predict(model, z, t, text | {REFERENCE: given}, g)
            for given in (pair, pair.flip(0), pair.transpose(2, 3))
        )
    assert (one[0] - one[1]).abs().max() > 1e-3 and (one - tall).abs().max() > 1e-3
    torch.testing.assert_close(other, one.flip(0), atol=1e-6, rtol=1e-6)


def test_guidance_keeps_the_norm_of_each_token():
    """As the stock pipeline computes it on tokens, of which each is a cell of the new latents."""
    family = families.get("qwenimage-edit")
    v, v_0 = torch.randn(2, 2, 8, 3, 5).unbind()
    wanted = rescaled_cfg(family.tokens(v, 1), family.tokens(v_0, 1), 4.0)
    torch.testing.assert_close(family.tokens(family.guided(v, v_0, 4.0), 1), wanted)


def test_no_reference_becomes_more_text_tokens_than_a_condition_has_room_for():
    """In shapes up to 1 : 4, as buckets have them, by the stock function and the library's image processor."""
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384})
    for name, side in (("qwenimage-edit", 1024), ("qwenimage-edit-plus", 384)):
        counts = []
        for number in range(-200, 201):
            ratio = 4 ** (number / 200)
            wide, high = calculate_dimensions(side**2, ratio)[:2]
            assert qwenimage_edit.resized_size(1000 * ratio, 1000, side) == (wide, high)
            counts.append(processor.get_number_of_image_patches(high, wide, {}) // 4)
        assert 0.9 * families.get(name).picture_tokens < max(counts) <= families.get(name).picture_tokens


def test_a_plan_says_why_text_embeddings_are_not_stored_and_what_the_pipeline_does_with_references(monkeypatch):
    """A row's two conditions are 2 x (256 + 1,408) x 3,584 numbers of 2 bytes."""
    monkeypatch.setattr(qwenimage_edit.QwenImageEdit, "reference_side", 1024)
    resolved = load("qwen-image-edit")
    sizes = shapes_of(resolved.recipe, resolved.identity)
    assert resolved.recipe.latents.text == "encode" and costs.text_bytes(resolved.recipe, sizes) == 0
    stored = load("qwen-image-edit", sets=["latents.text=cache"]).recipe
    assert costs.text_bytes(stored, sizes) == 2 * (256 + 1408) * 3584 * 2
    notes = plan.plan(resolved)["notes"]
    assert any("24 MB for each row" in note and "latents.text encode" in note for note in notes)
    assert not any("1024 x 1024 px" in note for note in notes)
    larger = plan.plan(load("qwen-image-edit", flags={"resolution": 2048}, sets=["data.beyond_base=true"]))["notes"]
    assert any("1024 x 1024 px" in note for note in larger)


def test_a_plan_counts_the_text_encoder_that_stays_beside_the_training():
    """16.8 GB of weights in bfloat16, which every rank has on its GPU."""
    totals, fixed = {}, ["adapt.zero=2", "adapt.phases.*.micro_batch=1"]
    for how in ("cache", "encode"):
        found = plan.plan(load("qwen-image-edit", sets=[f"latents.text={how}", *fixed]))
        totals[how] = {row["stage"]: row["gpu_gib"] for row in found["memory"]["stages"]}
    added = 2 * 8_419_059_187 / 2**30
    for stage in ("align-head", "adapt-1", "adapt-2"):
        assert totals["encode"][stage] - totals["cache"][stage] == pytest.approx(1.08 * added, abs=0.5)
    assert totals["encode"]["latents"] == totals["cache"]["latents"]


def test_any_recipe_leaves_the_embeddings_of_such_a_family_out_of_the_cache(source):
    flags = {"source": str(source.root), "ae": "tiny-dc-ae-f32", "resolution": 64}
    resolved = load(str(source.root), flags={"ae": "tiny-dc-ae-f32", "resolution": 64}, recipe="image")
    assert resolved.recipe.latents.text == "encode" and resolved.origins["latents.text"] == "family default"
    assert load("image", flags=flags, sets=["latents.text=cache"]).recipe.latents.text == "cache"


def test_several_references_are_told_apart_by_their_order(tmp_path):
    """The text encoder counts them, and each has positions of its own; as many as the family takes."""
    TINY["qwenimage-edit-plus"].build(tmp_path)
    pipeline = pipelines.load_pipeline(load_source("plus", str(tmp_path)), torch.float32)
    z, t, text, g = inputs(1)
    pair = [torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(number)) for number in (1, 2)]
    pictures = [to_image(pixels) for pixels in reference_pixels([(64, 64), (64, 96)])]
    found = []
    for order in (slice(None), slice(None, None, -1)):
        seen = pipelines.encode_text(PLUS, pipeline, ["swap them"], LENGTH, [pictures[order]])
        with torch.no_grad():
            references = dict(zip(reference_keys(2), pair[order], strict=True))
            found.append(
                (seen["encoder_hidden_states"], PLUS.predict(pipeline.transformer, z, t, text | references, g))
            )
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(*found, strict=True))
    for count in (0, 4):
        with pytest.raises(TypeError, match="is given 3 pictures"):
            PLUS.reference_call([torch.zeros(1, 3, 32, 32)] * count)


def test_a_converted_model_keeps_the_time_of_its_references():
    config = catalog.SOURCES["qwen-image-edit-2511"].transformer_config()
    assert config["zero_cond_t"] and PLUS.convert_config(config, 32, 32, 1024)["zero_cond_t"]
