"""Grids of pictures with captions: one row per prompt and one column per model show the effect of a stage."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dcgen_convert.core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

SIDE = 192  # px of a cell
GAP = 4  # px between cells
TITLE = 18  # px of the column titles
CAPTION = 14  # px of a row's caption
FRAMES = 5  # of a video that are shown, and that measures of pictures look at
INK, PAPER = (32, 32, 32), (255, 255, 255)


def cell(picture: Image, side: int = SIDE) -> Image:
    """The picture as a grid shows it: a square of ``side`` px, its own aspect ratio on paper."""
    from PIL import ImageOps

    picture = picture.convert("RGB")
    return picture if picture.size == (side, side) else ImageOps.pad(picture, (side, side), color=PAPER)


def grid(columns: Mapping[str, Sequence[Image]], captions: Sequence[str], side: int = SIDE) -> Image:
    """One picture of all pictures: columns side by side under their titles, and a caption above each row.

    Args:
        columns: title -> pictures, one per caption, any sizes; e.g. base | after this stage | autoencoder round trip.
        captions: one per row; each is cut to the width of the grid.
        side: side of a cell in px; pictures keep their aspect ratio.

    Raises:
        InputError: a column has more or fewer pictures than there are captions, or the grid would be empty.
    """
    from PIL import Image as images
    from PIL import ImageDraw, ImageFont

    for title, pictures in columns.items():
        if len(pictures) != len(captions):
            raise InputError(f"the column {title!r} has {len(pictures)} pictures for {len(captions)} captions")
    if not columns or not captions:
        raise InputError("a grid needs at least one column and one row")
    width = GAP + len(columns) * (side + GAP)
    height = TITLE + len(captions) * (CAPTION + side + GAP)
    sheet = images.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    title_font, caption_font = ImageFont.load_default(12), ImageFont.load_default(10)
    for x, title in enumerate(columns):
        pen.text((GAP + x * (side + GAP), 2), _fit(pen, title, title_font, side), INK, font=title_font)
    for y, caption in enumerate(captions):
        top = TITLE + y * (CAPTION + side + GAP)
        pen.text((GAP, top), _fit(pen, caption, caption_font, width - 2 * GAP), INK, font=caption_font)
        for x, pictures in enumerate(columns.values()):
            sheet.paste(cell(pictures[y], side), (GAP + x * (side + GAP), top + CAPTION))
    return sheet


def strips(columns: Mapping[str, Sequence[Sequence[Image]]], captions: Sequence[str]) -> Image:
    """One picture of all videos: each is a row of FRAMES of its frames, from the first to the last.

    The rows of one caption follow one another: they are the videos that stand side by side in `films`.

    Args:
        columns: title -> the frames of every video, one video per caption.
    """
    films = [
        (f"{title}: {caption}", column[y]) for y, caption in enumerate(captions) for title, column in columns.items()
    ]
    places = places_of(max(len(film) for _, film in films))
    shown = {f"frame {place + 1}": [film[min(place, len(film) - 1)] for _, film in films] for place in places}
    return grid(shown, [title for title, _ in films])


def places_of(count: int) -> list[int]:
    """Which of ``count`` frames stand for a video: at most FRAMES, evenly from the first to the last."""
    return sorted({round(number * (count - 1) / (FRAMES - 1)) for number in range(FRAMES)})


def films(columns: Mapping[str, Sequence[Sequence[Image]]], captions: Sequence[str]) -> list[Image]:
    """The videos side by side: `grid` of the first frames, of the second, and so on. A shorter one stays at its end."""
    count = max(len(film) for column in columns.values() for film in column)
    moments = [
        {title: [film[min(place, len(film) - 1)] for film in column] for title, column in columns.items()}
        for place in range(count)
    ]
    return [grid(moment, captions) for moment in moments]


def _fit(pen: ImageDraw, text: str, font: Font, width: int) -> str:
    """``text``, shortened with "..." to at most ``width`` px."""
    if pen.textlength(text, font=font) <= width:
        return text
    longest = (
        bisect_right(range(len(text)), float(width), key=lambda n: pen.textlength(text[:n] + "...", font=font)) - 1
    )
    return text[: max(longest, 0)] + "..."
