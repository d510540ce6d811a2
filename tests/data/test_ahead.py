"""Work that threads do ahead: in order, not too far ahead, errors in their turn, and no filter of warnings is lost."""

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
from PIL import Image

from dcgen_convert.data import ahead as module
from dcgen_convert.data import decoding
from dcgen_convert.data.ahead import ahead


def test_results_come_in_order_and_not_too_early(monkeypatch):
    monkeypatch.setattr(module, "threads", lambda: 3)
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.001 * (number % 3))
        return number * number

    results = ahead(range(20), work, depth=4)
    assert list(islice(results, 5)) == [0, 1, 4, 9, 16]
    assert max(begun) <= 4 + 5
    assert list(results) == [number * number for number in range(5, 20)]


def test_two_threads_work_at_the_same_time(monkeypatch):
    monkeypatch.setattr(module, "threads", lambda: 2)
    both = threading.Barrier(2, timeout=30)  # broken unless two wait in it together
    assert len(list(ahead(range(2), lambda _: both.wait(), depth=2))) == 2


def test_an_error_comes_in_its_turn():
    results = ahead([1, 0, 2], lambda number: 1 / number, depth=3)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_decoding_in_threads_keeps_the_filters_of_warnings(tmp_path):
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            pictures = list(pool.map(decoding.decode, [tmp_path / f"{number}.png" for number in range(40)]))
        assert [image.getpixel((0, 0))[0] for image, _ in pictures] == list(range(40))
        assert warnings.filters == before
