"""sample: deterministic pictures from bundles of every family and layout."""

import io

import numpy
import pytest
import torch
from PIL import Image

from dcgen_convert.bundle.loading import choose_runtime, load
from dcgen_convert.bundle.sample import beyond_training, draw, sample
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.core.files import sha256
from dcgen_convert.families import get

from .conftest import make_bundle


@pytest.mark.parametrize("name", ["flux", "sana", "dit"])
def test_a_picture_depends_on_its_seed_alone(parts, bundles, tmp_path, name):
    first = sample(bundles(name), ["fox", "trout"], tmp_path / "a", NULL, seed=5, count=2)
    assert [path.rsplit("/", 1)[1] for path in first["images"]] == [f"{i:04d}-seed-{5 + i}.png" for i in range(4)]
    assert (
        first["seeds"] == [5, 6, 7, 8]
        and first["prompts"] == ["fox", "fox", "trout", "trout"]
        and first["runtime"] == "stock"
    )
    hashes = [sha256(path) for path in first["images"]]
    assert len(set(hashes)) == 4
    assert Image.open(first["images"][0]).size == (parts(name).side,) * 2
    alone = sample(bundles(name), ["fox"], tmp_path / "b", NULL, seed=6)
    assert sha256(alone["images"][0]) == hashes[1]


def test_the_pixels_are_the_stock_pipeline_s(parts, bundles, tmp_path):
    from diffusers import DiffusionPipeline

    path = sample(bundles("flux"), ["a fox"], tmp_path, NULL, seed=3, steps=3, guidance=2.0, height=64, width=96)[
        "images"
    ][0]
    pipe = DiffusionPipeline.from_pretrained(bundles("flux"), trust_remote_code=True)
    call = dict(height=64, width=96, num_inference_steps=3, guidance_scale=2.0, max_sequence_length=16)
    expected = pipe("a fox", **call, generator=torch.Generator().manual_seed(3)).images[0]
    assert numpy.array_equal(numpy.asarray(Image.open(path)), numpy.asarray(expected))


def test_official_layout_draws_the_same(parts, bundles, tmp_path):
    official = make_bundle(parts("flux"), tmp_path / "official", layout="official")
    one, two = (sample(bundle, ["a fox"], tmp_path / bundle.name, NULL) for bundle in (official, bundles("flux")))
    assert sha256(one["images"][0]) == sha256(two["images"][0])


def test_a_batch_draws_what_single_calls_draw(parts, bundles):
    pipe, _ = load(bundles("sana"))
    settings = dict(height=128, width=128, steps=2, guidance=3.0, length=16)
    both = draw(pipe, get("sana"), ["fox", "trout"], [1, 2], **settings)
    single = draw(pipe, get("sana"), ["trout"], [2], **settings)[0]
    assert numpy.abs(numpy.asarray(both[1], int) - numpy.asarray(single, int)).max() <= 1


def test_what_cannot_be_drawn(bundles, tmp_path):
    for name, size, message in (
        ("flux", 70, "multiple of 32"),
        ("sana", 96, "multiple of 64"),
        ("dit", 128, "64 x 64 px only"),
    ):
        with pytest.raises(InputError, match=message):
            sample(bundles(name), ["fox"], tmp_path, NULL, height=size, width=size)
    with pytest.raises(InputError, match="nothing to draw"):
        sample(bundles("flux"), [], tmp_path, NULL)
    with pytest.raises(InputError, match="not quantised"):
        choose_runtime(bundles("flux"), "dequantised", torch.float32)
    with pytest.raises(InputError, match="does not exist"):
        choose_runtime(bundles("flux"), "fast", torch.float32)


def test_a_size_above_that_of_the_training_is_told_once(bundles, tmp_path):
    said = io.StringIO()
    console = Console(stderr=said)
    for size in ({}, {"height": 32, "width": 128}):  # as many pixels
        sample(bundles("flux"), ["fox"], tmp_path, console, steps=1, **size)
    assert "warning" not in said.getvalue()
    drawn = sample(bundles("flux"), ["fox", "trout"], tmp_path, console, steps=1, height=96, width=64)
    assert Image.open(drawn["images"][0]).size == (64, 96)
    assert said.getvalue().count("warning: tiny-flux: 96 x 64 px is more than the 64 px that it was trained for") == 1


PHASES = {"adapt": {"phases": [{"resolution": 512}, {"resolution": 256}]}}


@pytest.mark.parametrize(
    "made, most",
    [
        ({"recipe": PHASES}, 512),
        ({"recipe": {"source": "mine"}, "conversion": {"recipe": PHASES}}, 512),  # quantised later
        ({"recipe": {"source": "mine"}, "adopted": {}}, 256),
        ({"recipe": {"source": "mine"}, "sources": {"base": {}, "autoencoder": {}}}, 256),
        ({"recipe": {"source": "tiny-flux"}}, 256),  # only quantised
        ({"recipe": {"source": "mine"}}, 1414),  # of FLUX
    ],
)
def test_what_a_bundle_was_trained_for(made, most):
    manifest = {"defaults": {"height": 256, "width": 256}, "sources": {}, **made}
    assert not beyond_training(manifest, get("flux"), {}, most, most)
    assert f"more than the {most} px" in beyond_training(manifest, get("flux"), {}, most + 32, most)


def test_a_picture_that_is_not_finite_is_an_error(bundles):
    pipe, _ = load(bundles("dit"))
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(CheckFailed, match="not finite"):
        draw(pipe, get("dit"), ["fox"], [0], height=64, width=64, steps=1, guidance=4.0, length=1)
