"""The grid's geometry, read back from its pixels."""

import numpy
import pytest
from PIL import Image

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation.grids import CAPTION, GAP, SIDE, TITLE, films, grid, strips

RED, GREEN = numpy.array([20, 0, 0]), numpy.array([0, 20, 0])


def plain(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def cell(sheet, row, column, side):
    left, top = GAP + column * (side + GAP), TITLE + row * (CAPTION + side + GAP) + CAPTION
    return numpy.asarray(sheet.crop((left, top, left + side, top + side)))


def test_every_picture_lies_in_its_cell():
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (9, 9, 9)]]  # column, row
    columns = {
        title: [plain(c) for c in column] for title, column in zip(("source", "converted"), colours, strict=True)
    }
    sheet = grid(columns, ["a fox", "a trout"], side=48)
    assert sheet.size == (GAP + 2 * (48 + GAP), TITLE + 2 * (CAPTION + 48 + GAP))
    for column in range(2):
        for row in range(2):
            assert (cell(sheet, row, column, 48) == colours[column][row]).all()


def test_videos_are_rows_of_frames_and_a_film_shows_them_side_by_side():
    """Frame n of the first column is red n, of the second green n; the second column has fewer frames."""
    red, green = ([plain(tuple(n * unit)) for n in range(count)] for unit, count in ((RED, 9), (GREEN, 6)))
    columns = {"step 2": [red], "round trip": [green]}
    sheet, moments = strips(columns, ["a fox"]), films(columns, ["a fox"])
    assert sheet.size == (GAP + 5 * (SIDE + GAP), TITLE + 2 * (CAPTION + SIDE + GAP)) and len(moments) == 9
    for column, place in enumerate((0, 2, 4, 6, 8)):
        for row, (unit, last) in enumerate(((RED, 8), (GREEN, 5))):
            assert (cell(sheet, row, column, SIDE) == min(place, last) * unit).all()
    for number, moment in enumerate(moments):
        assert (cell(moment, 0, 0, SIDE) == number * RED).all()
        assert (cell(moment, 0, 1, SIDE) == min(number, 5) * GREEN).all()


def test_aspect_ratio_is_kept():
    area = cell(grid({"wide": [plain((255, 0, 0), (200, 100))]}, ["x"], side=40), 0, 0, 40)
    red = (area == (255, 0, 0)).all(-1)
    assert red.sum() == 40 * 20 and red[10:30].all()


def test_long_texts_stay_inside():
    words = "a very long caption " * 40
    pixels = numpy.asarray(grid({words: [plain((255, 255, 255))]}, [words], side=60))
    assert (
        (pixels[:, -GAP:] == 255).all()
        and (pixels[:TITLE] < 128).any()
        and (pixels[TITLE : TITLE + CAPTION] < 128).any()
    )


def test_columns_of_other_lengths_are_refused():
    with pytest.raises(InputError, match="'one' has 1 pictures for 2 captions"):
        grid({"one": [plain((0, 0, 0))]}, ["a", "b"])
    with pytest.raises(InputError, match="at least one"):
        grid({}, [])
