"""Prompts, images and the latent cache."""

import os
from bisect import bisect_left

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_save, sealed
from dcgen_convert.data import cache, images, prompts
from dcgen_convert.data.buckets import Span
from dcgen_convert.train.order import BatchOrder


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a", (40, 30)), ("b", (64, 64))):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}\n")
    return tmp_path


def test_folder_of_images_and_captions(folder):
    pictures = images.read_folder(folder)
    assert [picture.caption for picture in pictures] == ["picture a", "picture b"]
    pixels = images.read_pixels(pictures[0].file, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels[0].min() > 0.99 and pixels[1].max() < -0.99


def test_an_index_finds_its_pictures_where_data_and_run_lie_now(folder, tmp_path):
    """The index lies in the run folder, the pictures in the user's; both are moved."""
    (tmp_path / "run").mkdir()
    found = images.read_folder(folder)
    images.write_index(tmp_path / "run" / images.INDEX, found, folder)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "pictures"
    moved.mkdir()
    for picture in found:
        picture.file.rename(moved / picture.file.name)
    index = (tmp_path / "run" / images.INDEX).rename(tmp_path / "elsewhere" / images.INDEX)
    again = images.read_index(index, moved)
    assert [picture.file for picture in again] == [moved / "a.png", moved / "b.png"]
    assert [picture.caption for picture in again] == [picture.caption for picture in found]


def test_no_images_no_captions_and_broken_images_are_named(folder, tmp_path):
    (folder / "a.txt").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images have no caption, first .*a\.png"):
        images.read_folder(folder)
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:40])
    with pytest.raises(InputError, match=r"b\.png cannot be read"):
        images.read_pixels(folder / "b.png", 8)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no images"):
        images.read_folder(empty)


def test_index_round_trip_keeps_files_inside_and_outside_the_folder(folder, tmp_path):
    inside = images.Picture(folder / "a.png", 'é, "quoted"', 5)
    outside = images.Picture(tmp_path.parent / "elsewhere.png", "far", None, "ab12")
    images.write_index(folder / images.INDEX, [inside, outside], folder)
    assert images.read_index(folder / images.INDEX, folder) == [inside, outside]


def test_png_round_trip_is_within_half_a_level(tmp_path):
    pixels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images.to_image(pixels).save(tmp_path / "x.png")
    assert (images.read_pixels(tmp_path / "x.png", 8) - pixels).abs().max() <= 0.5 / 127.5 + 1e-6


def test_cache_returns_the_rows_that_were_written(tmp_path):
    z = torch.randn(10, 4, 2, 2)
    text = torch.randn(10, 3, 5).bfloat16()
    for number in range(3):
        part = slice(4 * number, 4 * number + 4)
        cache.write_shard(tmp_path, "target-64", number, {"z": z[part]})
        cache.write_shard(tmp_path, "text", number, {"encoder_hidden_states": text[part]})
    cache.write_shard(tmp_path, "null", 0, {"encoder_hidden_states": text[:1]})
    with pytest.raises(FileNotFoundError):
        cache.LatentCache(tmp_path, 64)  # no index yet: unfinished
    cache.write_index(tmp_path, 10, 4, [3])
    rows = cache.LatentCache(tmp_path, 64)
    got, condition = rows.batch([9, 0, 5])
    torch.testing.assert_close(got, z[[9, 0, 5]])
    assert torch.equal(condition["encoder_hidden_states"], text[[9, 0, 5]])
    train, held_out = rows.split()
    assert (len(train), len(held_out)) == (9, 1)
    torch.testing.assert_close(held_out.batch([0])[0], z[3:4])
    torch.testing.assert_close(train.batch([2, 3])[0], z[[2, 4]])
    with pytest.raises(InputError, match="no latents at 128 px"):
        cache.LatentCache(tmp_path, 128)


def small_cache(folder, key=None):
    z, text = torch.arange(10.0).view(10, 1, 1, 1), torch.zeros(10, 1, 1)
    cache.write_shard(folder, "target-64", 0, {"z": z})
    cache.write_shard(folder, "text", 0, {"encoder_hidden_states": text})
    cache.write_shard(folder, "null", 0, {"encoder_hidden_states": text[:1]})
    cache.write_captions(folder, [f"picture {i}, é" if i != 3 else "" for i in range(10)])
    cache.write_index(folder, 10, 10, [9], key)


def test_captions_are_those_that_were_written(tmp_path):
    small_cache(tmp_path)
    rows = cache.LatentCache(tmp_path, 64, encode=lambda rows: {"rows": rows})
    assert rows.captions([0, 9, 3]) == ["picture 0, é", "picture 9, é", ""]
    _, held_out = rows.split()
    assert held_out.condition([0]) == {"rows": [9]}


def test_a_cache_of_something_else_is_refused(tmp_path):
    key = {"weights": "a" * 64, "resolutions": [64]}
    small_cache(tmp_path, key)
    assert len(cache.LatentCache(tmp_path, 64, key=key)) == 10
    with pytest.raises(InputError, match=r"made from something else: weights \(a{24}, wanted b{24}\)"):
        cache.LatentCache(tmp_path, 64, key={**key, "weights": "b" * 64})


def anonymous_bytes() -> int:
    """Memory of this process that is not a view of a file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def test_ten_million_rows_cost_their_index_only(tmp_path):
    """19,532 shards of 512 rows (one file of each table under many names) in two buckets, read at random: at most 16 B
    a row,
    order of the epoch included."""
    count, per_shard, cut = 10_000_000, 512, 12_000 * 512
    grids = {"64-32x128": (2, 8), "64-64x64": (4, 4)}
    tables = {f"target-{table}": grid for table, grid in grids.items()}
    for table, grid in tables.items():
        z = torch.arange(float(per_shard)).view(-1, 1, 1, 1).expand(per_shard, 4, *grid).bfloat16()
        cache.write_shard(tmp_path, table, 0, {"z": z})
    cache.write_shard(tmp_path, "text", 0, {"encoder_hidden_states": torch.zeros(per_shard, 2, 2)})
    cache.write_shard(tmp_path, "null", 0, {"encoder_hidden_states": torch.zeros(1, 2, 2)})
    rows_of = dict(zip(tables, (cut, count - cut), strict=True)) | {"text": count}
    for table, rows in rows_of.items():
        for number in range(1, -(-rows // per_shard)):
            os.link(tmp_path / cache.shard_name(table, 0), tmp_path / cache.shard_name(table, number))
    spans = [Span("64-32x128", 32, 128, 0, cut), Span("64-64x64", 64, 64, cut, count)]
    cache.write_index(tmp_path, count, per_shard, [count - 1], spans={64: spans})
    assert (tmp_path / cache.INDEX).stat().st_size < 1000
    before = anonymous_bytes()
    rows, _ = cache.LatentCache(tmp_path, 64).split()
    order = BatchOrder(rows.spans, 16, seed=0)
    shards, shapes = set(), set()
    for step in range(300):
        indices = order.rows_of(step)
        shards |= {index // per_shard for index in indices}
        z0, _ = rows.batch(indices)
        shapes.add(z0.shape[2:])
        assert torch.equal(z0[:, 0, 0, 0], torch.tensor([index % per_shard for index in indices]).bfloat16().float())
    assert shapes == set(grids.values())
    assert len(shards) > cache.OPEN_SHARDS  # so that old ones had to be closed
    assert len(rows._open) == cache.OPEN_SHARDS
    assert anonymous_bytes() - before < 16 * count


def test_held_out_rows_come_from_everywhere_and_stay_held_out_when_rows_are_appended():
    names = [f"{folder}/{number:03d}.png" for folder in "abcdefghij" for number in range(40)]
    held = cache.hold_out(names)
    assert len(held) == 20 and len({names[row][0] for row in held}) > 5
    assert cache.hold_out(names) == held
    grown = cache.hold_out([*names, *(f"k/{number:03d}.png" for number in range(200))], held, 400)
    assert grown[:20] == held and len(grown) == 30 and min(grown[20:]) >= 400
    assert len(cache.hold_out([str(number) for number in range(20_000)])) == 512
    assert len(cache.hold_out(["a"])) == 1


@given(st.sets(st.integers(0, 60), max_size=12), st.integers(61, 80))
def test_the_other_rows_are_those_that_are_not_held_out(held, count):
    others = cache._Others(count, sorted(held))
    wanted = [number for number in range(count) if number not in held]
    assert list(others) == wanted and len(others) == len(wanted)
    assert [bisect_left(others, value) for value in range(count)] == [
        bisect_left(wanted, value) for value in range(count)
    ]


@pytest.mark.parametrize("kind, classes", [("builtin", None), ("tiny-world", None), ("builtin", ["cat", "dog", "fox"])])
def test_more_prompts_begin_with_the_same_ones(kind, classes):
    many = prompts.make(kind, 2500, 3, classes)
    assert len(many) == 2500 and all(
        prompts.make(kind, count, 3, classes) == many[:count] for count in (1, 17, 1024, 1500)
    )


def test_a_sealed_file_with_one_changed_bit_is_noticed(tmp_path):
    path = tmp_path / "z.safetensors"
    atomic_save({"z": torch.arange(64.0), "é": torch.zeros(2, 2).bfloat16(), "n": torch.tensor(3)}, path)
    assert sealed(path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, start + 100, len(whole) - 1, whole.index(b'"F32"') + 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        assert not sealed(path)
