"""What is said of a sample grid, against the measures called by hand."""

import pytest
import torch

from dcgen_convert.evaluation import measures, paired, previews, rows
from dcgen_convert.evaluation.measures import Weights
from dcgen_convert.evaluation.pixels import from_images, to_images
from dcgen_convert.tiny import videos, world

NAMES = ["accuracy", "frechet", "sharpness"]
COUNT = 8


@pytest.fixture(scope="module")
def table():
    """Lines of pictures that show the next picture's caption half of the time, beside right ones."""
    labels = world.sample_labels(COUNT, 3)
    captions = [world.caption(row) for row in labels.tolist()]
    right = world.draw(labels, 3)
    drawn = right.clone()
    drawn[::2] = right.roll(-1, 0)[::2]  # these show the caption of the next
    chosen = measures.chosen(NAMES, Weights(), captions)[0]
    pair = [to_images(drawn), to_images(right)]
    found = previews.lines(*(previews.seen(one, captions, chosen) for one in pair), chosen)
    return {line["measure"]: line for line in found}, chosen, captions, [from_images(one) for one in pair]


def test_scores_stand_beside_the_round_trips_and_beside_the_captions_of_others(table):
    found, (accuracy, *_), captions, (drawn, right) = table
    line, next_ones = found["accuracy"], [*captions[1:], captions[0]]
    own, best, other = (accuracy.scores(*what) for what in ((drawn, captions), (right, captions), (drawn, next_ones)))
    assert line["value"] == pytest.approx(own.mean().item()) and line["beside"] == "round trip"
    assert line["round_trip"] == pytest.approx(best.mean().item())
    assert line["difference"] == pytest.approx((own - best).mean().item()) and line["high"] < 0
    assert line["other_prompts"] == pytest.approx(other.mean().item())
    pairs = paired.compare(other, own)
    assert [line[key] for key in ("gain", "gain_low", "gain_high")] == [pairs.difference, pairs.low, pairs.high]
    of_right = best.mean() - accuracy.scores(right, next_ones).mean()
    assert line["gain_round_trip"] == pytest.approx(of_right.item()) and of_right > 2 * pairs.difference


def test_a_score_that_reads_no_caption_has_no_other_captions(table):
    assert "gain" not in table[0]["sharpness"] and "round_trip" in table[0]["sharpness"]


def test_distances_are_judged_by_halves(table):
    found, (_, frechet, _), _, (drawn, right) = table
    mine, best = frechet.features(drawn), frechet.features(right)
    line = found["frechet"]
    assert line["value"] == pytest.approx(frechet.distance(mine, best), rel=1e-5)
    assert line["halves"] == pytest.approx(frechet.distance(best[::2], best[1::2]), rel=1e-5)
    crossed = frechet.distance(mine[::2], best[1::2]) + frechet.distance(mine[1::2], best[::2])
    assert line["ratio"] == pytest.approx(crossed / 2 / line["halves"], rel=1e-5)


def test_videos_are_measured_in_all_their_frames():
    """As `evaluate` measures a batch of them; beside the picture that each was drawn from."""
    labels = videos.sample_labels(4, 5)
    captions, clips = [videos.caption(row) for row in labels.tolist()], videos.draw(labels, 5, 6, 64)
    names = ["motion-accuracy", "temporal-difference", "first-frame", "sharpness", "colour"]
    chosen = measures.chosen(names, Weights(), captions, edited=True, moving=True)[0]
    frames = [to_images(clip.movedim(1, 0)) for clip in clips]
    sources = to_images(clips[:, :, 1])
    found = previews.seen(frames, captions, chosen, sources)
    seen = torch.stack([from_images(one).movedim(0, 1) for one in frames])
    wanted = rows.measured([(seen, captions, from_images(sources))], chosen)
    assert [*found.own.scores] == names[:4] and [*found.own.features] == names[4:]
    for name, values in {**wanted.scores, **wanted.features}.items():
        torch.testing.assert_close({**found.own.scores, **found.own.features}[name], values, atol=1e-6, rtol=1e-6)
    assert [*found.other.scores] == ["motion-accuracy"]
    colour, features = chosen[-1], wanted.features["colour"].unflatten(0, (4, 5))  # five frames of each
    line = previews.lines(found, found, chosen)[-1]
    halves = colour.distance(features[::2].flatten(0, 1), features[1::2].flatten(0, 1))
    assert line["halves"] == pytest.approx(halves, rel=1e-5)


def test_few_pictures_have_no_halves():
    labels = world.sample_labels(3, 5)
    captions, pictures = [world.caption(row) for row in labels.tolist()], to_images(world.draw(labels, 5))
    chosen = measures.chosen(["frechet"], Weights(), captions)[0]
    once = previews.seen(pictures, captions, chosen)
    assert previews.lines(once, once, chosen) == [{"measure": "frechet", "value": 0.0, "beside": "round trip"}]


def test_a_measure_without_a_value_has_no_line():
    class Nothing(measures.Score):
        name, label = "nothing", "applies to no caption"

        def scores(self, pictures, captions):
            return torch.full((len(pictures),), float("nan"), dtype=torch.float64)

    pictures = to_images(torch.zeros(2, 3, 8, 8))
    once = previews.seen(pictures, ["a", "b"], [Nothing()])
    assert previews.lines(once, once, [Nothing()]) == []
