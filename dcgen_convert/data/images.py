"""Captioned pictures: an index of files, read and cropped to a square of the training resolution.

index.jsonl   one object per picture: {"file", "caption", "seed"}; relative files lie beside the index
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dcgen_convert.errors import InputError
from dcgen_convert.files import atomic_write

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
INDEX = "index.jsonl"


@dataclass(frozen=True)
class Picture:
    file: Path
    caption: str
    seed: int | None = None


def read_folder(path: Path) -> list[Picture]:
    """Pictures of a folder with a .txt caption beside each, or of a .jsonl with "file" and "caption".

    Raises:
        InputError: nothing there, no pictures, or pictures without captions (named).
    """
    path = Path(path).expanduser().absolute()  # the index of a run lies elsewhere
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise InputError(f"{path} does not exist", "give a folder of images with .txt captions, or a .jsonl")
        return _read_jsonl(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder", "give a folder of images with .txt captions, or a .jsonl")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(
            f"{path} holds no images ({', '.join(sorted(SUFFIXES))})", "give a folder of images with .txt captions"
        )
    bare = [file for file in files if not file.with_suffix(".txt").is_file()]
    if bare:
        raise InputError(
            f"{len(bare)} of {len(files)} images have no caption, first {bare[0]}",
            f"write {bare[0].with_suffix('.txt').name} beside it",
        )
    return [Picture(file, file.with_suffix(".txt").read_text(encoding="utf-8").strip()) for file in files]


def _read_jsonl(path: Path) -> list[Picture]:
    pictures = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            pictures.append(Picture(path.parent / record["file"], str(record["caption"]), record.get("seed")))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} line {number} needs an object with file and caption: {error}") from error
    if not pictures:
        raise InputError(f"{path} lists no images")
    return pictures


def write_index(folder: Path, pictures: list[Picture]) -> None:
    rows = []
    for picture in pictures:
        file = picture.file.relative_to(folder) if picture.file.is_relative_to(folder) else picture.file
        rows.append(
            json.dumps({"file": str(file), "caption": picture.caption, "seed": picture.seed}, ensure_ascii=False)
        )
    atomic_write(folder / INDEX, "\n".join(rows) + "\n")


def read_pixels(file: Path, side: int) -> Tensor:
    """(3, side, side) float32 in [-1, 1]: centre square, resized with Lanczos.

    Raises:
        InputError: the file is missing, no image, or cut off.
    """
    try:
        with Image.open(file) as image:
            image = image.convert("RGB")
            edge = min(image.size)
            left, top = (image.width - edge) // 2, (image.height - edge) // 2
            if (image.width, image.height) != (side, side):
                image = image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + edge, top + edge))
            array = numpy.asarray(image, dtype=numpy.float32)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"the image {file} cannot be read: {error}", "replace or remove it") from error
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> PIL image."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
