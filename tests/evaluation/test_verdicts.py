"""Early verdicts, on curves like those that miniature trainings gave."""

import pytest

from dcgen_convert.evaluation import verdicts
from dcgen_convert.evaluation.curves import Curves

# tiny-flux with its quick recipe: held-out loss, and what 16 pictures gave after 50 to 350 steps.
HEALTHY = [(0, 1.414), (50, 1.033), (100, 0.807), (150, 0.723), (200, 0.668), (250, 0.64), (300, 0.613)]
ACCURACY = [(50, 0.354, 0.469), (100, 0.385, 0.5), (150, 0.427, 0.552), (200, 0.531, 0.635), (300, 0.542, 0.656)]
SHARPNESS = [(50, 0.00501), (100, 0.00453), (150, 0.00583), (200, 0.00717), (300, 0.00851)]
TRIP = 0.01213
RATIO = [(50, 2.25), (100, 2.03), (150, 1.75), (200, 1.12), (300, 1.08)]


def line(step, value, **more):
    return {"step": step, "value": value, **more}


def scores(rows):
    """Lines of a score: (step, gain by the own caption, its upper bound)."""
    return [
        line(step, 0.28 + gain, other_prompts=0.28, gain=gain, gain_high=high, gain_round_trip=0.646)
        for step, gain, high in rows
    ]


def sharpness(rows, trip=TRIP):
    return [
        line(step, value, round_trip=trip, difference=value - trip, high=value - trip + 0.002) for step, value in rows
    ]


def ratios(rows):
    return [line(step, 600 * ratio, halves=600.0, ratio=ratio) for step, ratio in rows]


def curves(held_out=HEALTHY, nothing=2.01, accuracy=ACCURACY, sharp=SHARPNESS, ratio=RATIO):
    found = {"accuracy": scores(accuracy), "tiny-cmmd": ratios(ratio), "sharpness": sharpness(sharp)}
    return Curves(list(held_out), nothing, found)


def signs(found):
    return [verdict.sign for verdict in found]


@pytest.mark.parametrize("count", range(len(HEALTHY) + 1))
def test_a_healthy_training_hears_nothing_at_any_time(count):
    last = HEALTHY[count - 1][0] if count else -1
    parts = [[row for row in rows if row[0] <= last] for rows in (ACCURACY, SHARPNESS, RATIO)]
    assert not verdicts.of(curves(HEALTHY[:count], 2.01, *parts))


def test_a_random_head_is_said_before_the_first_step_and_stays_said():
    start = verdicts.alignment_missing([(0, 4.09)], 2.01)
    assert start.sign == "alignment missing" and "4.09" in start.seen and "2.01" in start.seen
    assert "align_head.method" in start.advice and start.grave and "after step" not in start.seen
    later = verdicts.alignment_missing([(0, 4.09), (20, 1.76)], 2.01)
    assert "after step 20 it is 1.76" in later.seen


def test_a_head_of_zeros_or_an_unknown_start_are_no_alarm():
    assert not verdicts.alignment_missing([(0, 2.01)], 2.01)
    assert not verdicts.alignment_missing([(0, 4.09)], None)
    assert not verdicts.alignment_missing([(500, 4.09)], 2.01)  # the start is not known


def test_a_loss_that_turns_round_diverges():
    found = verdicts.diverges([(0, 1.4), (100, 0.8), (200, 0.75), (300, 0.95)])
    assert found.sign == "it diverges" and "0.75 at step 200" in found.seen and "0.95 after step 300" in found.seen
    assert verdicts.diverges([(0, 1.0), (100, 1.2), (200, 1.3)])  # it never fell
    assert not verdicts.diverges([(0, 1.4), (100, 0.75), (200, 0.8)])  # jitter
    assert not verdicts.diverges([(0, 1.0), (100, 1.3)])  # two points are no course


LOST = [(50, 0.354, 0.469), (100, 0.02, 0.11), (150, -0.01, 0.09)]
GOOD = [(50, 1.1), (100, 1.1), (150, 1.0)]


def test_pictures_that_look_right_and_heed_no_caption_have_lost_the_text():
    [found] = verdicts.of(curves(HEALTHY[:4], accuracy=LOST, sharp=SHARPNESS[:3], ratio=GOOD))
    assert found.sign == "text is lost" and "accuracy is 0.27 after step 150" in found.seen
    assert "0.28 with the captions of other pictures" in found.seen and "gain 0.646" in found.seen
    assert "guidance-corrected" in found.advice


@pytest.mark.parametrize(
    "change",
    [
        {"accuracy": LOST[:2]},  # one grid may be an accident
        {"ratio": [*GOOD[:2], (150, 4.2)]},  # the pictures are bad: that they heed nothing is no wonder
        {"sharp": [*SHARPNESS[:2], (150, 0.035)]},  # they are noise
        {"ratio": []},  # nothing is known of them
    ],
)
def test_text_is_not_lost_where_it_is_not_sure(change):
    given = {"accuracy": LOST, "sharp": SHARPNESS[:3], "ratio": GOOD} | change
    assert not verdicts.of(curves([(0, 1.9), (50, 1.7), (100, 1.5), (150, 1.3)], **given))


def test_text_is_lost_where_the_loss_is_low_and_no_picture_looks_right():
    """As where tiny-flux learned captions of other pictures: guidance by noise spoils what it draws."""
    bad = [(50, 3.4), (100, 5.4), (150, 5.3)]
    [found] = verdicts.of(curves([(0, 1.41), (100, 1.0), (150, 0.95)], accuracy=LOST, sharp=[], ratio=bad))
    assert found.sign == "text is lost" and "loss has fallen to 0.95 (2.01 for a model that answers zero)" in found.seen
    assert not verdicts.of(curves([(0, 1.41), (100, 1.0), (150, 0.95)], None, LOST, [], bad))


def test_a_missing_alignment_explains_lost_text():
    found = verdicts.of(curves([(0, 4.09), (100, 1.0), (150, 0.95)], accuracy=LOST, sharp=[], ratio=GOOD))
    assert signs(found) == ["alignment missing"]


def test_captions_that_the_round_trips_do_not_heed_say_nothing():
    lines = [row | {"gain_round_trip": 0.0} for row in scores(LOST)]
    assert not verdicts.text_lost({"accuracy": lines, "tiny-cmmd": ratios(GOOD)}, HEALTHY, 2.01)


FLAT = [(0, 1.4), (100, 0.8), (200, 0.7), (300, 0.69)]


def test_blur_counts_where_the_loss_has_levelled_out():
    soft = sharpness([(200, 0.0044), (300, 0.0045)])
    found = verdicts.blurred(soft, FLAT)
    assert found.sign == "blurred" and "0.0045 after step 300, 37%" in found.seen and "mode lora" in found.advice
    assert not verdicts.blurred(soft, HEALTHY[:4])  # still learning
    assert not verdicts.blurred(sharpness([(200, 0.0044), (300, 0.0065)]), FLAT)
    assert not verdicts.blurred(soft[1:], FLAT)


def test_patience_says_how_many_steps_brought_how_much():
    flat = [(0, 1.4), (100, 0.8), (200, 0.7), (300, 0.698)]
    found = verdicts.patience(flat, {"accuracy": scores([(100, 0.5, 0.6), (200, 0.51, 0.6), (300, 0.52, 0.6)])})
    assert found.sign == "it hardly improves" and not found.grave
    assert "100 steps, from 200 to 300, brought 0.3% of the held-out loss (0.7 to 0.698)" in found.seen
    assert "accuracy 0.79 to 0.8" in found.seen
    assert not verdicts.patience(HEALTHY, {}) and not verdicts.patience(flat[:3], {})
    assert not verdicts.patience([*flat[:3], (300, 0.72)], {})  # it rises: another verdict
