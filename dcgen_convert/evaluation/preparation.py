"""How a picture becomes the input of a network of transformers: resized, cropped and normalised as its folder says.

The library's own image processors do the same, but which class of them is taken depends on what else is installed, and
without torchvision some refuse to work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from dcgen_convert.core.files import read_object, understood
from dcgen_convert.evaluation.pixels import to_images

FILE, WHOLE_FILE = "preprocessor_config.json", "processor_config.json"
CLIP: dict[str, Any] = {
    "size": 224,
    "crop_size": 224,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
DINO: dict[str, Any] = {
    "size": 256,
    "crop_size": 224,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}
DETECTOR: dict[str, Any] = {**DINO, "size": 800, "do_center_crop": False, "resample": Image.Resampling.BILINEAR}
LARGEST = 4096  # px of a side


@dataclass(frozen=True)
class Preparation:
    """What is done to a picture.

    Attributes:
        shortest: px of the shorter side, with the longer one in proportion; or
        size: (height, width) in px. Both None: it stays as it is.
        crop: (height, width) in px of the middle that is taken; None: all of it.
        mean, std: of each channel in 0..1.
        resample: filter, as a number of Pillow.
    """

    shortest: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = Image.Resampling.BICUBIC

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) in px of what comes out for a square picture; None: that of the picture."""
        return self.crop or self.size or ((self.shortest, self.shortest) if self.shortest else None)

    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, h, w) float32 on the CPU, by way of 8 bits."""
        prepared = torch.stack([torch.from_numpy(numpy.array(self._fitted(one))) for one in to_images(pictures)])
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return (prepared.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def _fitted(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.shortest:
            short = min(width, height)
            height, width = int(self.shortest * height / short), int(self.shortest * width / short)
        elif self.size:
            height, width = self.size
        image = image.resize((width, height), self.resample)
        if not self.crop:
            return image
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))


def read(folder: Path, usual: Mapping[str, Any]) -> Preparation:
    """The preparation that the image processor in ``folder`` asks for.

    Args:
        usual: what holds for keys that it does not have, and where there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    file, config = folder / FILE, {}
    if file.is_file():
        config = read_object(file)
    elif (folder / WHOLE_FILE).is_file():  # newer versions of transformers write one file for tokenizer and pictures
        file = folder / WHOLE_FILE
        with understood(file):
            config = dict(read_object(file).get("image_processor", {}))
    with understood(file):
        found = {**usual, **{key: value for key, value in config.items() if value is not None}}
        shortest, size = _size(found["size"]) if found.get("do_resize", True) else (None, None)
        crop = _pair(found["crop_size"]) if found.get("do_center_crop", True) else None
        mean, std = (tuple(map(float, found[key])) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError("image_mean and image_std must be three numbers each")
        filter_ = Image.Resampling(found.get("resample", Image.Resampling.BICUBIC))
        return Preparation(shortest, size, crop, mean, std, filter_)


def _size(value: Any) -> tuple[int | None, tuple[int, int] | None]:
    """(shortest, size) of a config: a number is the shorter side."""
    if isinstance(value, Mapping) and "shortest_edge" in value:
        value = value["shortest_edge"]
    return (_side(value), None) if isinstance(value, int) else (None, _pair(value))


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else (value["height"], value["width"])
    return _side(height), _side(width)


def _side(value: Any) -> int:
    if not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise ValueError(f"a side of a picture must be from 1 to {LARGEST} px, not {str(value)[:40]}")
    return value
