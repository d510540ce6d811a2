"""The tiny world in motion: what moves, where to, and that nothing else does."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from dcgen_convert.tiny import videos, world
from tools.tiny.videos import main

MOTIONS = tuple(videos.MOTIONS)
SIDE = 64
STILL = MOTIONS.index("standing still")


def rows(motion: str, **more: str) -> torch.Tensor:
    """One row for each shape, plain red on snow, large, in the centre; or as ``more`` says."""
    values = dict(color="red", scene="on snow", place="in the center", size="large", texture="plain") | more
    picked = [videos.ATTRIBUTES[name].index(value) for name, value in values.items()]
    return torch.tensor([[shape, *picked, MOTIONS.index(motion)] for shape in range(len(world.SHAPES))])


def seen(clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, y, area) of what is red on snow, in px, each (B, frames). By the pixels alone."""
    green = (clips[:, 1] + 1) / 2  # of red 0.12, of snow 0.92
    mass = ((0.8 - green) / 0.6).clamp(0, 1)
    area = mass.sum((2, 3))
    axis = torch.arange(clips.shape[-1]) + 0.5
    return (mass.sum(2) * axis).sum(2) / area, (mass.sum(3) * axis).sum(2) / area, area


@pytest.mark.parametrize(
    "motion,way", [("leftwards", (-1, 0)), ("rightwards", (1, 0)), ("upwards", (0, -1)), ("downwards", (0, 1))]
)
def test_the_shape_moves_that_way_at_one_speed(motion, way):
    """Each step to 0.15 px of 64; area to 2 %."""
    x, y, area = seen(videos.draw(rows(f"moving {motion}"), 3, frames=9, side=SIDE))
    step = videos.TRAVEL * SIDE / world.SIDE / 8
    for place, sign in ((x, way[0]), (y, way[1])):
        torch.testing.assert_close(place.diff(dim=1), torch.full_like(place[:, 1:], sign * step), atol=0.15, rtol=0)
    torch.testing.assert_close(area, area[:, :1].expand_as(area), atol=0, rtol=0.02)


def test_a_growing_shape_stays_where_it_is():
    """Radius 0.7 to 1.3 of the picture's: the ratio of the areas to 4 %. A triangle's mass is not at its centre."""
    x, y, area = seen(videos.draw(rows("growing"), 3, frames=9, side=SIDE))
    assert (area.diff(dim=1) > 0).all()
    assert (x - x[:, 4:5]).abs().max() < 0.3 and (y - y[:, 4:5]).abs().max() < 1.5
    torch.testing.assert_close(area[:, -1] / area[:, 0], torch.full((6,), (1.3 / 0.7) ** 2), atol=0, rtol=0.04)


@pytest.mark.parametrize("side", [64, 128])
def test_a_still_one_is_a_picture(side):
    clips = videos.draw(rows("standing still", texture="dotted", place="at the top left"), 3, side=side)
    picture = world.draw(rows("standing still", texture="dotted", place="at the top left")[:, :-1], 3, side)
    assert clips.shape == (6, 3, 16, side, side)
    assert all(torch.equal(frame, picture) for frame in clips.unbind(2))


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_middle_is_the_picture_of_the_same_attributes(motion):
    labels = videos.sample_labels(12, 5)
    labels[:, -1] = MOTIONS.index(motion)
    clips, picture = videos.draw(labels, 5, frames=3, side=SIDE), world.draw(labels[:, :-1], 5, SIDE)
    assert torch.equal(clips[:, :, 1], picture) and torch.equal(videos.draw(labels, 5, 1, SIDE)[:, :, 0], picture)
    moved = (clips[:, :, 2] - clips[:, :, 0]).abs().amax((1, 2, 3)) > 0.1
    assert (moved == (MOTIONS.index(motion) != STILL)).all()


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_background_does_not_move(motion):
    """A border of 4 px, which no shape of the centre meets."""
    clips = videos.draw(rows(motion, size="small"), 3, frames=5, side=SIDE)
    for edge in (clips[..., :4, :], clips[..., -4:, :], clips[..., :4], clips[..., -4:]):
        assert torch.equal(edge, edge[:, :, :1].expand_as(edge))


def test_every_caption_is_read_back_and_its_words_are_clear():
    assert len(set(videos.ATTRIBUTES)) == 7
    names = [len(values) for values in videos.ATTRIBUTES.values()]
    for labels in videos.sample_labels(200, 1).tolist():
        assert videos.parse(videos.caption(labels)) == labels
    assert videos.parse("a small plain red circle in the center on grass") is None
    assert videos.parse("a cat, growing") is None
    every = [phrase.split() for phrase in MOTIONS]
    others = {word for values in world.ATTRIBUTES.values() for value in values for word in value.split()}
    assert not others & set(itertools.chain(*every))
    assert torch.tensor(names).prod() == 32_400


def test_every_value_is_as_frequent_and_tied_to_no_other():
    """3,000 rows: the motion's shares to 0.03, given each value of each attribute with fewer than 7 values to 0.08."""
    labels = videos.sample_labels(3000, 2)
    share = torch.nn.functional.one_hot(labels[:, -1], len(MOTIONS)).double()
    assert (share.mean(0) - 1 / 6).abs().max() < 0.03
    for column, values in enumerate(world.ATTRIBUTES.values()):
        for value in range(len(values)):
            assert (share[labels[:, column] == value].mean(0) - 1 / 6).abs().max() < 0.08


def test_the_command_writes_them(tmp_path):
    for name in ("one", "two"):
        main([str(tmp_path / f"{name}.safetensors"), "--count", "20", "--frames", "5", "--side", "64"])
    held = load_file(tmp_path / "one.safetensors")
    assert held["videos"].shape == (20, 3, 5, 64, 64) and held["videos"].dtype is torch.uint8
    assert torch.equal(held["labels"], videos.sample_labels(20, 0))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    drawn = (videos.draw(held["labels"][16:], 1, 5, 64) + 1) * 127.5
    torch.testing.assert_close(held["videos"][16:].float(), drawn, atol=0.51, rtol=0)
