"""Measures against second implementations: explicit sums, loops over pairs, the existing figures."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from PIL import Image

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation import measures, paired, pixels, tiny_world
from dcgen_convert.evaluation.kernel import cmmd
from dcgen_convert.evaluation.measures import Weights
from dcgen_convert.evaluation.metrics import frechet
from dcgen_convert.evaluation.plain import Colour, Sharpness
from dcgen_convert.tiny import world

CAPTION = "a small striped red circle at the top left on grass"


def drawn(count: int = 6, seed: int = 3, side: int = 128) -> tuple[torch.Tensor, list[str]]:
    labels = world.sample_labels(count, seed)
    return world.draw(labels, seed, side), [world.caption(row) for row in labels.tolist()]


def only(name: str, captions: list[str] = [CAPTION], side: int = 256):  # noqa: B006
    return measures.chosen([name], Weights(), captions, side=side)[0][0]


PLAIN = ["accuracy", "frechet", "tiny-cmmd", "crops-frechet", "sharpness", "colour"]


@pytest.mark.parametrize("name", PLAIN)
def test_one_picture_at_a_time_gives_what_many_give(name):
    """And a distance of a set and itself is 0, and the same both ways."""
    pictures, captions = drawn(6, side=256)
    measure = only(name, captions)
    if measure.kind == "score":
        whole = measure.scores(pictures, captions)
        single = [measure.scores(picture[None], [text]) for picture, text in zip(pictures, captions, strict=True)]
        assert whole.dtype == torch.float64 and whole.shape == (6,)
        assert torch.allclose(torch.cat(single), whole, atol=1e-12)
        return
    a = measure.features(pictures)
    assert a.dtype == torch.float32 and len(a) == 6
    single = torch.cat([measure.features(picture[None]) for picture in pictures])
    assert torch.allclose(single, a, rtol=1e-4, atol=1e-4)
    b = measure.features(drawn(6, 4, side=256)[0])
    apart = measure.distance(a, b)
    assert apart > 1e-3 and measure.distance(b, a) == pytest.approx(apart, rel=1e-6)
    assert measure.distance(a, a) == pytest.approx(0, abs=1e-6 * apart)


def test_tiny_measures_are_the_figures_of_the_conversion():
    pictures, captions = drawn(20)
    noisy = (pictures + 0.8 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    scores = only("accuracy", captions).scores(noisy, captions)
    shown, wanted = tiny_world.judge().read(noisy), torch.tensor([world.parse(text) for text in captions])
    assert scores.mean().item() == pytest.approx((shown == wanted).double().mean().item()) and scores.mean() < 1
    measure = only("frechet", captions)
    a, b = measure.features(pictures), measure.features(noisy)
    assert measure.distance(a, b) == pytest.approx(frechet(tiny_world.features(pictures), tiny_world.features(noisy)))
    large, other = drawn(4, 5, side=256)[0], drawn(4, 6, side=256)[0]
    crops = only("crops-frechet", captions)
    expected = frechet(*(tiny_world.features(tiny_world.crops(pictures)) for pictures in (large, other)))
    assert crops.distance(crops.features(large), crops.features(other)) == pytest.approx(expected, rel=1e-5)


def test_distances_follow_the_accuracy_as_pictures_get_worse():
    """More and more noise: the accuracy falls, and both distances to other pictures of the tiny world rise."""
    pictures, captions = drawn(50)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(7))
    real = tiny_world.features(drawn(80, 31)[0])
    rows = []
    for strength in (0, 0.2, 0.5, 1.0):
        worse = (pictures + strength * noise).clamp(-1, 1)
        features = tiny_world.features(worse)
        distances = [only(name, captions).distance(features, real) for name in ("frechet", "tiny-cmmd")]
        rows.append((-only("accuracy", captions).scores(worse, captions).mean().item(), *distances))
    for column in zip(*rows, strict=True):
        assert list(column) == sorted(set(column)), rows


def test_cmmd_against_loops_over_pairs():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 5, generator=generator), torch.randn(4, 5, generator=generator) + 1

    def mean(x: torch.Tensor, y: torch.Tensor) -> float:
        total = 0.0
        for one in x.double().tolist():
            for other in y.double().tolist():
                long, wide = math.hypot(*one), math.hypot(*other)
                square = sum((p / long - q / wide) ** 2 for p, q in zip(one, other, strict=True))
                total += math.exp(-square / (2 * 10**2))
        return total / len(x) / len(y)

    assert cmmd(a, b) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9) and cmmd(a, b) == pytest.approx(cmmd(b, a), rel=1e-12)
    assert cmmd(3 * a, b / 7) == pytest.approx(cmmd(a, b), rel=1e-6)  # lengths play no part
    many = torch.randn(2100, 3, generator=generator)
    assert cmmd(many, many[:1500]) == pytest.approx(cmmd(many.flip(0), many[:1500]), abs=1e-9)  # parts add up
    for bad in (torch.zeros(1, 5), torch.zeros(4, 3), torch.full((4, 5), math.nan)):
        with pytest.raises(InputError):
            cmmd(a, bad)


def test_sharpness_against_a_plain_fourier_sum():
    generator = torch.Generator().manual_seed(2)
    picture = torch.rand(1, 3, 16, 12, generator=generator) * 2 - 1
    red, green, blue = pixels.to_uint8(picture)[0].double().tolist()
    light = [[0.299 * red[y][x] + 0.587 * green[y][x] + 0.114 * blue[y][x] for x in range(12)] for y in range(16)]
    mean = sum(map(sum, light)) / (16 * 12)
    fine = every = 0.0
    for v in range(16):
        for u in range(12):
            total = 0j
            for y in range(16):
                for x in range(12):
                    fade = math.sin(math.pi * y / 15) ** 2 * math.sin(math.pi * x / 11) ** 2
                    total += (light[y][x] - mean) * fade * cmath.exp(-2j * math.pi * (v * y / 16 + u * x / 12))
            every += abs(total) ** 2
            fine += abs(total) ** 2 * (math.hypot(min(v, 16 - v) / 16, min(u, 12 - u) / 12) > 1 / 8)
    assert Sharpness().scores(picture, [""]).item() == pytest.approx(fine / every, rel=1e-9)


def test_blur_lowers_the_sharpness_and_noise_raises_it():
    pictures, captions = drawn(4)
    scores = Sharpness().scores(pictures, captions)
    blurred = torch.nn.functional.avg_pool2d(pictures, 5, stride=1, padding=2, count_include_pad=False)
    noisy = pictures + 0.2 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    assert (Sharpness().scores(blurred, captions) < 0.7 * scores).all()
    assert (Sharpness().scores(noisy, captions) > scores).all()
    assert Sharpness().scores(torch.full((1, 3, 64, 64), 0.3), [""]).item() == 0


def test_colour_against_pillow():
    """Pillow's YCbCr is rounded to 8 bits and has 128 for grey."""
    pictures = drawn(5)[0]
    images = [image.convert("YCbCr") for image in pixels.to_images(pictures)]
    values = torch.stack([pixels._pixels(image).double().flatten(1) for image in images])
    expected = torch.cat([values.mean(-1) - torch.tensor([0, 128, 128]), values.std(-1, correction=0)], 1)
    found = Colour().features(pictures)
    assert torch.allclose(found.double(), expected, atol=0.7) and found.shape == (5, 6)
    darker = Colour().features(0.5 * pictures - 0.5)
    assert Colour().distance(found, darker) > 1000


def test_pictures_in_8_bits_and_through_jpeg():
    values = torch.tensor([-2, -1, -0.5, 0, 0.999, 1, 2.0])
    picture = values.reshape(1, 1, 1, -1).expand(1, 3, 1, -1)
    eight = pixels.to_uint8(picture)
    assert eight[0, 0, 0].tolist() == [0, 0, 64, 128, 255, 255, 255]  # 64.25 and 255.37 lose their fraction
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, -1).expand(1, 3, 1, -1)
    assert torch.equal(pixels.to_uint8(pixels.to_float(every)), every)
    pictures = drawn(2)[0]
    again = pixels.through_jpeg(pictures)
    assert again.shape == pictures.shape and not torch.equal(pixels.to_uint8(again), pixels.to_uint8(pictures))
    for picture, other in zip(pictures, again, strict=True):
        assert (picture - other).square().mean() < 0.01
    assert not torch.equal(Colour().features(again), Colour().features(pictures))
    assert Image.fromarray(pixels.to_uint8(again)[0].permute(1, 2, 0).numpy()).size == (128, 128)


def test_the_choice_takes_what_is_at_hand_and_says_what_it_leaves_out():
    found, left_out = measures.chosen(None, Weights(), [CAPTION], side=128)
    assert {"accuracy", "frechet", "tiny-cmmd", "sharpness", "colour"} == {one.name for one in found}
    assert "256 px" in left_out["crops-frechet"]
    found, left_out = measures.chosen(None, Weights(), ["a fox in the snow"], side=512)
    assert [one.name for one in found] == ["sharpness", "colour"] and "a fox in the snow" in left_out["accuracy"]
    assert {*left_out, "sharpness", "colour"} == set(measures.known())
    assert [one.name for one in measures.chosen(["colour", "sharpness", "colour"], Weights(), [])[0]] == [
        "colour",
        "sharpness",
    ]


def test_a_measure_that_cannot_be_used_is_an_error_where_it_was_asked_for():
    with pytest.raises(InputError, match="no measure 'sharpnes'") as caught:
        measures.chosen(["sharpnes"], Weights(), [])
    assert caught.value.hint.startswith("did you mean sharpness?")
    with pytest.raises(InputError, match="accuracy cannot be used: the tiny world has no caption 'a fox'"):
        measures.chosen(["accuracy"], Weights(), ["a fox"])
    with pytest.raises(InputError, match="crops-frechet cannot be used: it needs pictures of 256 px"):
        measures.chosen(["crops-frechet"], Weights(), [CAPTION], side=255)


def test_paired_differences_against_a_second_bootstrap():
    import numpy

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, generator=generator, dtype=torch.float64)
    b = a + 0.3 + 0.5 * torch.randn(60, generator=generator, dtype=torch.float64)
    a[3], b[7], b[3] = math.nan, math.nan, math.nan
    found = paired.compare(a, b)
    kept = [(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True) if not (math.isnan(x) or math.isnan(y))]
    assert (found.pairs, found.dropped) == (58, 2)
    assert found.difference == pytest.approx(sum(y - x for x, y in kept) / 58)
    assert found.mean_b - found.mean_a == pytest.approx(found.difference)
    random = numpy.random.default_rng(5)
    means = [numpy.mean([kept[i][1] - kept[i][0] for i in random.integers(0, 58, 58)]) for _ in range(4000)]
    low, high = numpy.percentile(means, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.02) and found.high == pytest.approx(high, abs=0.02)
    assert found.decided and found == paired.compare(a, b) and found != paired.compare(a, b, seed=1)
    same = paired.compare(a, a)
    assert (same.difference, same.low, same.high, same.decided, same.dropped) == (0, 0, 0, False, 1)
    turned = paired.compare(b, a)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    for wrong in ((a, b[:-1]), (torch.tensor([math.nan]), torch.tensor([1.0]))):
        with pytest.raises(InputError):
            paired.compare(*wrong)
