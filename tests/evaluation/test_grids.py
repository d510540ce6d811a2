"""The grid's geometry, read back from its pixels."""

import numpy
import pytest
from PIL import Image

from dcgen_convert.core.errors import InputError
from dcgen_convert.evaluation.grids import CAPTION, GAP, TITLE, grid


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
