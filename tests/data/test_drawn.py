"""Pictures of the tiny world as a source of pictures."""

from __future__ import annotations

from itertools import combinations

import numpy
import pytest
import torch
from PIL import Image

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import drawn, drawn_edits, given, images, prompts
from dcgen_convert.evaluation import tiny_edits, tiny_world
from dcgen_convert.recipe.loading import load
from dcgen_convert.tiny import world


def taken(work, count, *texts, edited=False):
    return given.take(given.parse_all(texts), count, work, edited=edited)


def test_pictures_show_their_captions_at_the_size_that_is_asked_for(tmp_path):
    pictures, told = taken(tmp_path / "sources", 40, "tiny-world:192")
    assert told == "40 pictures taken: tiny-world:192 40 of 40 pictures" and len(pictures) == 40
    pixels = [numpy.asarray(Image.open(picture.file)) for picture in pictures]
    assert {part.shape for part in pixels} == {(192, 192, 3)}
    shown = torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    assert tiny_world.accuracy(shown, [picture.caption for picture in pictures]) > 0.97
    assert len({part.tobytes() for part in pixels}) == 40


def test_edits_show_what_their_instructions_ask_for_and_keep_the_rest(tmp_path):
    pictures, told = taken(tmp_path / "sources", 60, "tiny-edits:96", edited=True)
    assert told == "60 pictures taken: tiny-edits:96 60 of 60 pictures"
    edited, given_ = (
        torch.stack([images.read_pixels(file, 96) for file in files])
        for files in ([one.file for one in pictures], [one.references[0] for one in pictures])
    )
    instructions = [one.caption for one in pictures]
    assert (
        tiny_edits.changed(edited, instructions).mean() > 0.97 > 0.1 > tiny_edits.changed(given_, instructions).mean()
    )
    assert tiny_edits.kept(edited, given_, instructions).nanmean() > 0.97
    assert given.most_references(given.parse_all(["tiny-edits:96"])) == 1
    more, _ = taken(tmp_path / "more", 2000, "tiny-edits:32", edited=True)
    few, _ = taken(tmp_path / "few", 1100, "tiny-edits:32", edited=True)
    assert [one.caption for one in more[:1100]] == [one.caption for one in few]


def test_long_draws_never_begin_again():
    """torch's generator reads 32 bits of a seed: blocks whose seeds differ above them would all be the same."""
    captions = prompts.generated("tiny-world", 4096, 7)
    scenes, _, instructions = drawn_edits.pairs(4096, 7)
    for draws in (captions, instructions, scenes.tolist()):
        blocks = [draws[start : start + 1024] for start in range(0, 4096, 1024)]
        assert all(one != other for one, other in combinations(blocks, 2))
    assert len(set(captions)) > 2500 < len(scenes.unique(dim=0))  # of 5,400 scenes
    assert captions[:1024] == prompts.generated("tiny-world", 1024, 7)


def test_a_model_that_draws_from_text_alone_takes_no_edits(tmp_path):
    with pytest.raises(InputError, match="tiny-edits:64 gives edits, and the model draws from text alone"):
        taken(tmp_path, 4, "tiny-edits:64")


def test_more_pictures_begin_with_the_same_ones_and_keep_their_files(tmp_path):
    few, _ = taken(tmp_path, 3, "tiny-world:64")
    before = [(picture.file.read_bytes(), picture.file.stat().st_mtime_ns) for picture in few]
    few[1].file.write_bytes(before[1][0][:100])  # a damaged one is drawn again
    many, _ = taken(tmp_path, 6, "tiny-world:64")
    assert many[:3] == few and [picture.file.read_bytes() for picture in few] == [data for data, _ in before]
    times = [picture.file.stat().st_mtime_ns for picture in few]
    assert (times[0], times[2]) == (before[0][1], before[2][1]) and times[1] != before[1][1]


def test_it_is_one_source_among_others(tmp_path):
    (tmp_path / "mine").mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / "mine" / f"{number}.png")
        (tmp_path / "mine" / f"{number}.txt").write_text("mine")
    pictures, _ = taken(tmp_path / "sources", 8, f"{tmp_path / 'mine'}=0.5", "tiny-world:64=0.5")
    assert sum(picture.caption == "mine" for picture in pictures) == 4 and len(pictures) == 8


@pytest.mark.parametrize(
    "text, wanted", [("tiny-world:256", 256), ("tiny-world", None), ("tiny-world:x", None), ("tiny-edits:64", 64)]
)
def test_its_name(text, wanted):
    assert drawn.side_of(text) == wanted


def test_a_size_that_is_none_is_refused():
    with pytest.raises(InputError, match="tiny-world:9999: the tiny world is drawn at 32 to 2048 px"):
        given.parse("tiny-world:9999")


@pytest.mark.parametrize("name, side, ae", [("tiny-flux-256", 256, "f32"), ("tiny-flux-512", 512, "f64")])
def test_the_recipes_of_large_miniatures_read_it(name, side, ae):
    recipe = load(name).recipe
    assert recipe.data.paths == (f"tiny-world:{side}",) and recipe.data.kind == "folder"
    assert recipe.data.prompts == "tiny-world" and recipe.ae.endswith(ae)
    assert [phase.resolution for phase in recipe.adapt.phases] == [recipe.data.resolution] == [side]


def test_crops_are_the_middle_of_the_picture_at_its_own_pixels():
    pictures = world.draw(world.sample_labels(2, 5), 5, 300)
    found = tiny_world.crops(pictures)
    assert found.shape == (8, 3, 128, 128)
    whole = torch.cat([torch.cat([*found[0:4:2]], 2), torch.cat([*found[4:8:2]], 2)], 1)
    assert torch.equal(whole, pictures[0, :, 22:278, 22:278])


def test_distance_of_crops_sees_what_shrinking_hides(monkeypatch):
    """Noise of one pixel's size averages out when the judge shrinks a picture of 512 px."""
    monkeypatch.setattr(tiny_world, "FEWEST", 24)
    labels = world.sample_labels(24, 9)
    clean, captions = world.draw(labels, 9, 512), [world.caption(row.tolist()) for row in labels]
    noisy = clean + 0.25 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    whole, parts = (
        [measure(pictures, captions) for pictures in (clean, noisy)]
        for measure in (tiny_world.distance, tiny_world.distance_of_crops)
    )
    assert parts[1] - parts[0] > 3 * (whole[1] - whole[0])


def test_pictures_are_drawn_on_one_thread_and_the_threads_come_back(tmp_path, monkeypatch):
    threads, seen = torch.get_num_threads(), []
    monkeypatch.setattr(drawn_edits.images, "write", lambda pixels, file: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        drawn_edits.draw(tmp_path, 2, seed=0, side=32)
        assert seen == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
