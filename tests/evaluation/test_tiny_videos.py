"""The evaluators of videos of the tiny world, against what was drawn."""

import pytest
import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation import tiny_videos
from dcgen_convert.tiny import videos

COUNT, SEED = 96, 31


@pytest.fixture(scope="module")
def drawn():
    labels = videos.sample_labels(COUNT, SEED)
    return labels, torch.cat([videos.draw(rows, SEED + i) for i, rows in enumerate(labels.split(16))])


@pytest.mark.parametrize("frames", [16, 13, 9])
def test_drawn_videos_show_what_their_captions_say(drawn, frames):
    """The first frames of 16. Of 9 the one that is read is 3.6 px away from the middle of all: shapes suffer."""
    labels, clips = drawn
    captions = [videos.caption(row) for row in labels.tolist()]
    found = tiny_videos.found(clips[:, :, :frames], captions)
    least = 0.9 if frames == 9 else 0.97
    assert found.double().mean(0).min() >= least


def test_a_video_that_runs_backwards_shows_the_other_direction(drawn):
    labels, clips = drawn
    there, back = (tiny_videos.read(way)[:, 6] for way in (clips, clips.flip(2)))
    opposite = torch.tensor([1, 0, 3, 2, 4])
    moving = labels[:, 6] < 5
    assert (back[moving] == opposite[there[moving]]).double().mean() > 0.97


def test_frames_that_stand_still_are_read_as_such(drawn):
    _, clips = drawn
    still = tiny_videos.read(clips[:, :, 8:9].expand(-1, -1, 16, -1, -1))[:, 6]
    assert (still == 4).all()


def test_one_wrong_word_is_one_wrong_attribute(drawn):
    labels, clips = drawn
    other = labels.clone()
    other[:, 6] = (labels[:, 6] + 1) % len(videos.MOTIONS)
    captions = [videos.caption(row) for row in other.tolist()]
    assert tiny_videos.found(clips, captions)[:, 6].double().mean() < 0.03
    assert tiny_videos.accuracy(clips, captions) == pytest.approx(6 / 7, abs=0.015)
    assert tiny_videos.right(clips, captions).shape == (COUNT,)


@pytest.mark.parametrize("caption", ["a small plain red circle in the center on grass", "a cat, growing"])
def test_other_captions_are_refused(caption):
    with pytest.raises(InputError, match="has no video 'a "):
        tiny_videos.right(torch.zeros(1, 3, 5, 32, 32), [caption])
