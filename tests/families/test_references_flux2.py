"""FLUX.2 with several references: which is whose, their order, and where the target's tokens are found.

N tokens of the target, M of both references, L of the text.
"""

import pytest
import torch

from dcgen_convert import families
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.families.base import reference_keys
from dcgen_convert.networks import models, pipelines

from .tiny_models import TINY
from .tiny_parts import reference_pixels

FLUX2 = families.get("flux2")
N, M, L = 16, 6 + 4, 5


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("klein") / "source"
    TINY["flux2-klein"].build(folder)
    return folder


@pytest.fixture(scope="module")
def model(source):
    return models.load(source / "transformer", torch.float32)


def inputs():
    """(z, t, text, references) of two rows: latents of 32 channels in patches of 2 x 2."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(2, *shape, generator=generator)

    text, references = {"encoder_hidden_states": random(L, 48)}, [random(32, 4, 6), random(32, 4, 4)]
    return random(32, 8, 8), torch.full((2,), 0.4), text, references


@torch.no_grad()
def predicted(model, z, t, text, references):
    keys = reference_keys(len(references))
    return FLUX2.predict(model, z, t, text | dict(zip(keys, references, strict=True)))


def test_swapped_references_of_a_batch_swap_its_predictions(model):
    z, t, text, references = inputs()
    z, text = z[:1].expand_as(z), {key: value[:1].expand_as(value) for key, value in text.items()}
    one = predicted(model, z, t, text, references)
    other = predicted(model, z, t, text, [reference.flip(0) for reference in references])
    assert (one[0] - one[1]).abs().max() > 1e-3
    torch.testing.assert_close(other, one.flip(0), atol=1e-6, rtol=1e-6)


def test_the_order_of_references_and_each_of_them_matter(model):
    z, t, text, references = inputs()
    found = [predicted(model, z, t, text, given) for given in (references, references[::-1], references[:1], [])]
    assert all(one.shape == z.shape for one in found)
    assert all((one - other).abs().max() > 1e-4 for n, one in enumerate(found) for other in found[:n])


def test_block_maps_are_those_of_the_target(model):
    """Blocks with two streams give the image apart, blocks with one behind the text; the references stand last."""
    z, t, text, references = inputs()
    seen = {}
    for block in FLUX2.block_modules(model):
        block.register_forward_hook(lambda module, _, output: seen.setdefault(type(module).__name__, output))
    head = model.get_submodule(FLUX2.head)
    head.register_forward_hook(lambda module, args, _: seen.setdefault("head", args[0]))
    predicted(model, z, t, text, references)
    double, single = seen["Flux2TransformerBlock"], seen["Flux2SingleTransformerBlock"]
    assert double[1].shape[1] == seen["head"].shape[1] == N + M and single.shape[1] == L + N + M
    for output, wanted in ((double, double[1][:, :N]), (single, single[:, L : L + N])):
        found = FLUX2.block_map(output, (4, 4), text)
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), wanted, atol=0, rtol=0)
    torch.testing.assert_close(FLUX2.head_inputs(seen["head"], N, text), seen["head"][:, :N], atol=0, rtol=0)


def test_each_prompt_of_a_batch_is_drawn_with_its_own_references(source):
    """The stock pipeline gives all prompts of a call the same pictures, so each has its own call: as it draws alone."""
    pipeline = pipelines.load_pipeline(load_source("klein", str(source)), torch.float32)
    settings = dict(side=64, steps=1, guidance=1.0, length=TINY["flux2-klein"].length)

    def drawn(prompts, references):
        return pipelines.draw(FLUX2, pipeline, prompts, [1] * len(prompts), **settings, references=references)

    first = reference_pixels([(64, 96)])
    for other in ([-first[0]], reference_pixels([(96, 64), (64, 64)])):  # of one number and size, and of others
        found, alone = drawn(["a", "a"], [first, other]), [drawn(["a"], [own]) for own in (first, other)]
        torch.testing.assert_close(found, torch.cat(alone), atol=0, rtol=0)
        assert (found[0] - found[1]).abs().max() > 1e-3
