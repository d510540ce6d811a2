"""Prompts, images and the latent cache."""

import os

import pytest
import torch
from PIL import Image

from dcgen_convert.core.errors import InputError
from dcgen_convert.data import cache, images, prompts
from dcgen_convert.data.buckets import Span
from dcgen_convert.train.order import BatchOrder


def test_builtin_prompts_have_millions_of_combinations_and_a_seed():
    drawn = prompts.make("builtin", 500, 1)
    assert drawn == prompts.make("builtin", 500, 1) != prompts.make("builtin", 500, 2)
    assert len(set(drawn)) > 490


def test_prompts_of_a_file_are_repeated_in_order(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\n\n two \n")
    assert prompts.make(str(file), 3, 0) == ["one", "two", "one"]
    file.write_text(" \n")
    with pytest.raises(InputError, match="empty"):
        prompts.make(str(file), 3, 0)
    with pytest.raises(InputError, match="does not exist"):
        prompts.make(str(tmp_path / "none.txt"), 3, 0)


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


def test_a_listing_changes_with_every_file_that_is_read(folder):
    """Equal as long as nothing changes, another one after every single change."""
    seen = [images.listing(folder)]
    assert images.listing(folder) == seen[0]
    (folder / "notes.md").write_text("not read")
    assert images.listing(folder) == seen[0]
    changes = [
        lambda: (folder / "a.txt").write_text("another caption"),
        lambda: os.utime(folder / "b.png", ns=(0, 10**9)),
        lambda: (folder / "b.png").rename(folder / "c.png"),
        (folder / "a.png").unlink,
    ]
    for change in changes:
        change()
        seen.append(images.listing(folder))
    (folder / "list.jsonl").write_text('{"file": "c.png", "caption": "x"}\n')
    seen.append(images.listing(folder / "list.jsonl"))
    os.utime(folder / "c.png", ns=(0, 2 * 10**9))
    seen.append(images.listing(folder / "list.jsonl"))
    assert None not in seen and len(set(seen)) == len(seen)
    assert images.listing(folder / "gone") is None


def test_a_relative_folder_is_found_from_the_index_of_a_run(folder, tmp_path, monkeypatch):
    """The index lies elsewhere, and the files that it names are still the same."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(folder.parent)
    images.write_index(tmp_path / "run", images.read_folder(folder.name))
    assert [picture.file for picture in images.read_folder(tmp_path / "run" / images.INDEX)] == [
        folder / "a.png",
        folder / "b.png",
    ]


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
    outside = images.Picture(tmp_path.parent / "elsewhere.png", "far", None)
    images.write_index(folder, [inside, outside])
    assert images.read_folder(folder / images.INDEX) == [inside, outside]


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
    cache.write_index(tmp_path, 10, 4)
    rows = cache.LatentCache(tmp_path, 64)
    got, condition = rows.batch([9, 0, 5])
    torch.testing.assert_close(got, z[[9, 0, 5]])
    assert torch.equal(condition["encoder_hidden_states"], text[[9, 0, 5]])
    train, held_out = rows.split()
    assert (len(train), len(held_out)) == (9, 1)
    torch.testing.assert_close(held_out.batch([0])[0], z[9:])
    with pytest.raises(InputError, match="no latents at 128 px"):
        cache.LatentCache(tmp_path, 128)


def small_cache(folder, key=None):
    z, text = torch.arange(10.0).view(10, 1, 1, 1), torch.zeros(10, 1, 1)
    cache.write_shard(folder, "target-64", 0, {"z": z})
    cache.write_shard(folder, "text", 0, {"encoder_hidden_states": text})
    cache.write_shard(folder, "null", 0, {"encoder_hidden_states": text[:1]})
    cache.write_captions(folder, [f"picture {i}, é" if i != 3 else "" for i in range(10)])
    cache.write_index(folder, 10, 10, key)


def test_captions_are_those_that_were_written(tmp_path):
    small_cache(tmp_path)
    rows = cache.LatentCache(tmp_path, 64, encode=lambda texts: {"texts": texts})
    assert rows.captions([0, 9, 3]) == ["picture 0, é", "picture 9, é", ""]
    _, held_out = rows.split()
    assert held_out.condition([0]) == {"texts": ["picture 9, é"]}


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
    cache.write_index(tmp_path, count, per_shard, spans={64: spans})
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
