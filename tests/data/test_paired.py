"""How many rows are paired, and which."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcgen_convert.data import cache
from dcgen_convert.data.buckets import Span, whole
from dcgen_convert.data.paired import paired_rows
from dcgen_convert.recipe.paired import enough


@pytest.mark.parametrize("inputs, tokens, pictures", [
    (32, 7_800, 2048),  # DC-AE-V at 640 px: 200 x 32 / 88 = 73 would do
    (32, 16, 2048),  # tiny-flux: 200 x 32 / 4 = 1,600 would do
    (128, 4, 12_800),  # tiny-flux to f64: 200 x 128 / 2
    (128, 64, 3200),  # SANA to f64 at 512 px: 200 x 128 / 8
    (512, 2, 72_408),  # 200 x 512 / 1.41421 = 72,407.7
])  # fmt: skip
def test_enough_pictures_by_hand(inputs, tokens, pictures):
    assert enough(inputs, tokens) == pictures


def test_a_twentieth_of_the_paired_rows_is_held_out_and_they_come_from_everywhere():
    """Of 20,000 pictures 512 are held out, one of 39: of 2,000 paired ones 100 are, more than that share."""
    names = [f"{folder}/{number}.png" for folder in "abcdefghij" for number in range(2000)]
    held, every = cache.hold_out(names), whole(20_000, 64)
    found = paired_rows(names, held, every, 2000)
    assert len(held) == 512 and len(found) == 2000 and len(set(found) & set(held)) == 100
    assert {names[row][0] for row in found} == {*"abcdefghij"}
    assert paired_rows(names, held, every, 20_000) == list(range(20_000)) == paired_rows(names, held, every, 90_000)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(2, 300), st.integers(0, 40))
def test_every_table_has_its_share_and_rows_that_are_there_stay(lengths, wanted, added):
    def spans(lengths):
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        parts = zip(starts, lengths, strict=True)
        return [Span("abc"[i % 3], 1, 1, at, at + length) for i, (at, length) in enumerate(parts)]

    count = sum(lengths)
    names = [str(number) for number in range(count + added)]
    held = cache.hold_out(names[:count])
    found = paired_rows(names[:count], held, spans(lengths), wanted)
    assert found == sorted(set(found)) and min(wanted, count) <= len(found) <= min(wanted, count) + 6
    for table in "abc":
        rows = {row for span in spans(lengths) if span.table == table for row in span.rows}
        share = wanted * len(rows) / count
        assert not rows or min(len(rows), int(share)) - 1 <= len(rows & set(found)) <= share + 2
        assert not rows or rows & set(found)
    assert paired_rows(names[:count], held, spans(lengths), wanted, found, count) == found
    later = cache.hold_out(names, held, count)
    grown = paired_rows(names, later, spans([*lengths, *([added] if added else [])]), wanted, found, count)
    assert [row for row in grown if row < count] == found
