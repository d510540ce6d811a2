"""Aspect-ratio buckets against brute force: which sizes there are, which picture goes where, in which order rows
lie.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dcgen_convert.data import buckets, images
from dcgen_convert.stages import latents

SIDES = st.integers(1, 4000)
SHAPES = st.tuples(SIDES, SIDES)


@given(st.integers(1, 20), st.sampled_from([16, 64]), st.none() | st.integers(1, 40))
def test_sizes_are_those_that_cannot_grow_one_way_without_exceeding_the_area(cells, step, longest):
    resolution, longest = cells * step, longest and longest * step
    area = resolution**2
    multiples = range(step, 4 * resolution + 1, step)
    brute = {
        (h, w)
        for h in multiples
        for w in multiples
        if h * w <= area < max(h * (w + step), (h + step) * w) and max(h, w) <= min(4 * min(h, w), longest or math.inf)
    }
    found = buckets.sizes(resolution, step, longest)
    assert set(found) == brute and len(found) == len(brute)
    assert [w / h for h, w in found] == sorted(w / h for h, w in found)
    assert longest or (resolution, resolution) in found


def test_sizes_of_sdxl():
    """Of the 21 shapes of arXiv 2307.01952, appendix I, up to the square, all but the four that it narrows further."""
    published = [
        (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
        (640, 1536),
        (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152),
        (896, 1088),
        (960, 1088), (960, 1024), (1024, 1024),
    ]  # fmt: skip
    assert set(published) - set(buckets.sizes(1024, 64)) == {(704, 1344), (832, 1152), (896, 1088), (960, 1024)}


@given(SHAPES, st.integers(2, 20))
def test_a_picture_goes_to_the_bucket_of_the_nearest_ratio(shape, cells):
    (width, height), found = shape, buckets.sizes(cells * 32, 32)
    h, w = buckets.nearest(found, width, height)
    distances = {size: abs(math.log(width * size[0]) - math.log(height * size[1])) for size in found}
    assert distances[h, w] <= min(distances.values()) + 1e-12
    kept = {
        (a, b): min(width, height * b / a) * min(height, width * a / b) for a, b in found
    }  # px that the crop leaves
    assert kept[h, w] == pytest.approx(max(kept.values()), rel=1e-12)


@given(
    st.lists(
        st.sampled_from([(3, 2), (2, 3), (1, 1), (16, 9), (900, 1600), (101, 100)]) | SHAPES, min_size=1, max_size=80
    )
)
def test_rows_of_a_bucket_lie_together_at_every_resolution(shapes):
    count = len(shapes)
    order = buckets.by_shape(shapes)
    assert sorted(order) == list(range(count))
    for resolution, step in ((128, 32), (512, 64), (1024, 64)):
        found = buckets.sizes(resolution, step)
        spans = buckets.spans([shapes[i] for i in order], found, resolution, [0] * len(order))
        assert [row for span in spans for row in span.rows] == list(range(count))
        for span in spans:
            assert {buckets.nearest(found, *shapes[order[row]]) for row in span.rows} == {(span.height, span.width)}
        assert all(len(parts) == 1 for parts in buckets.tables(spans).values())


@pytest.mark.parametrize(
    "shape, size", [((300, 200), (96, 160)), ((192, 700), (224, 64)), ((64, 128), (128, 64)), ((90, 60), (64, 64))]
)
def test_pixels_are_the_centred_crop_that_pillow_fits(tmp_path, shape, size):
    """Against ImageOps.fit where the crop begins at a whole pixel, as ours always does; equal."""
    noise = (torch.rand(shape[1], shape[0], 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    Image.fromarray(noise.numpy()).save(tmp_path / "x.png")
    assert images.size_of(tmp_path / "x.png") == shape
    pixels = images.read_pixels(tmp_path / "x.png", *size)
    fitted = ImageOps.fit(Image.open(tmp_path / "x.png"), (size[1], size[0]), Image.Resampling.LANCZOS)
    assert pixels.shape == (3, *size)
    assert images.to_image(pixels).tobytes() == fitted.tobytes()


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(1, 4))
def test_ranks_share_the_shards_of_all_tables(lengths, world):
    """Every row of every table once; a table's rows in the order of its spans, so that the index finds them."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    spans = [
        buckets.Span("ab"[i % 2], 1, 1, at, at + length)
        for i, (at, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    tables = [[span.rows for span in parts] for parts in buckets.tables(spans).values()]
    jobs = [SimpleNamespace(crew=SimpleNamespace(rank=rank, world=world)) for rank in range(world)]
    found = sorted(
        shard for job in jobs for shard in latents.own_shards(job, tables, latents.shard_rows(sum(lengths), 1))
    )
    assert len({(table, number) for table, number, _ in found}) == len(found)
    for table, parts in enumerate(tables):
        shards = [rows for at, _, rows in found if at == table]
        assert [row for rows in shards for row in rows] == [row for part in parts for row in part]
        assert all(len(rows) == latents.shard_rows(sum(lengths), 1) for rows in shards[:-1])


@pytest.mark.parametrize("count, each, rows", [
    (10, 1, 32), (50_000, 1, 196), (10**6, 1, 512),
    (10**6, 4 * 16 * 512**2, 16),  # FLUX's own latents of 4096 px
    (10**6, 2 * 512 * 4096, 64),  # T5 embeddings of 512 tokens
    (10**6, 1 << 30, 1),
])  # fmt: skip
def test_a_shard_is_small_enough_to_be_put_together_in_memory(count, each, rows):
    assert latents.shard_rows(count, each) == rows


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 20))
def test_rows_to_look_at_are_of_every_shape(lengths, count):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    parts = [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    chosen = buckets.first_of_each(parts, count)
    assert len({row for rows in chosen for row in rows}) == sum(map(len, chosen)) == min(count, sum(lengths))
    assert len(chosen) == min(len(parts), count) and all(
        any(set(rows) <= set(part) for part in parts) for rows in chosen
    )
    assert max(map(len, chosen)) <= max(-(-count // len(parts)), 1) or min(map(len, parts)) < count
