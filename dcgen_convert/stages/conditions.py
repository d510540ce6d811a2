"""The conditions of rows: their captions through the text encoders, with the references where those see them too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL.Image import Image

from dcgen_convert.core.pixels import to_image
from dcgen_convert.data import buckets, contents, images
from dcgen_convert.data.buckets import Size
from dcgen_convert.data.cache import Captions
from dcgen_convert.data.images import Picture
from dcgen_convert.families import Family, Text
from dcgen_convert.families.base import Pipeline
from dcgen_convert.networks import pipelines


@dataclass
class Conditions:
    """Encodes rows of the latents.

    Attributes:
        encoders: gives the pipeline that encodes. length: text tokens that prompts are padded to.
        folder: of the latents; root: what the files in its index are relative to.
        side, shapes: px of squares, or (height, width) in px of the buckets: references are cut as for the latents.
    """

    family: Family
    encoders: Callable[[], Pipeline]
    length: int
    folder: Path
    root: Path
    side: int
    shapes: Sequence[Size]

    def of(self, rows: Sequence[int]) -> Text:
        """The conditions of ``rows``, each tensor (rows, ...)."""
        captions = Captions(self.folder).read(rows)
        seen = [self._seen(self._pictures[row]) for row in rows] if self.family.picture_tokens else []
        return pipelines.encode_text(self.family, self.encoders(), captions, self.length, seen)

    def null(self) -> Text:
        """The condition of the empty prompt, a batch of one; empty where every row brings one of its own."""
        if self.family.picture_tokens:
            return {}
        return pipelines.encode_text(self.family, self.encoders(), [""], self.length)

    @cached_property
    def _pictures(self) -> list[Picture]:
        return images.read_index(self.folder / images.ROWS, self.root)

    def _seen(self, picture: Picture) -> list[Image]:
        """The references of a picture, in the size of its bucket."""
        moving, size = self.family.axes == 3, (self.side, self.side)
        if self.shapes:
            size = buckets.nearest(self.shapes, *contents.size_of(picture.file, moving))
        if moving:  # the first frame of the video
            return [to_image(contents.read(picture.file, [(1, *size)])[0][:, 0])]
        return [to_image(images.read_pixels(file, *size)) for file in picture.references]
