"""Captioned pictures: an index of files, read and cropped to the size that is asked for.

index.jsonl   one object per picture: {"file", "caption", "seed"}; relative files lie beside the index
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_write, read_lines, read_text

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
INDEX = "index.jsonl"
EXAMPLE = '{"file": "images/fox.png", "caption": "a red fox"}'


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
    path = Path(path).expanduser().absolute()  # what is written into an index lies beside it or is absolute
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
    return [Picture(file, read_text(file.with_suffix(".txt")).strip()) for file in files]


def _read_jsonl(path: Path) -> list[Picture]:
    pictures = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            pictures.append(_picture(json.loads(line), path.parent))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} cannot be used: {error}", f"write {EXAMPLE}") from error
    if not pictures:
        raise InputError(f"{path} lists no images", f"write one line per picture: {EXAMPLE}")
    return pictures


def _picture(record: object, folder: Path) -> Picture:
    """The picture of one line of a .jsonl in ``folder``; ValueError says what is wrong with the line."""
    if not isinstance(record, dict):
        raise ValueError("it is no object with file and caption")
    file, caption, seed = (record.get(key) for key in ("file", "caption", "seed"))
    for key, text in (("file", file), ("caption", caption)):
        if not isinstance(text, str):
            raise ValueError(
                f"{key} must be a text, not {json.dumps(text)[:60]}" if key in record else f"it has no {key}"
            )
    if not isinstance(seed, int | None) or isinstance(seed, bool):
        raise ValueError(f"seed must be a whole number, not {json.dumps(seed)[:60]}")
    caption.encode()  # half of a surrogate pair is no text
    return Picture(folder / file, caption, seed)


def listing(path: Path) -> str | None:
    """Hash of the names, sizes and modification times of what `read_folder` reads; None for a missing path.

    It is cheap: no picture is opened. It changes when a caption or a picture is changed, added or taken away.
    """
    path = Path(path).expanduser()
    if path.suffix == ".jsonl" and path.is_file():
        files = [path, *(picture.file for picture in _read_jsonl(path))]
    elif path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix.lower() in {*SUFFIXES, ".txt"}]
    else:
        return None
    digest = hashlib.sha256()
    for file in sorted(files):
        stat = file.stat() if file.is_file() else None
        known = stat and (stat.st_size, stat.st_mtime_ns)
        digest.update(f"{os.path.relpath(file, path.parent)} {known}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def write_index(folder: Path, pictures: list[Picture], name: str = INDEX) -> None:
    rows = []
    for picture in pictures:
        file = picture.file.relative_to(folder) if picture.file.is_relative_to(folder) else picture.file
        rows.append(
            json.dumps({"file": str(file), "caption": picture.caption, "seed": picture.seed}, ensure_ascii=False)
        )
    atomic_write(folder / name, "\n".join(rows) + "\n")


def size_of(file: Path) -> tuple[int, int]:
    """(width, height) in px, from the file's header.

    Raises:
        InputError: the file is missing or no image.
    """
    with _reading(file), Image.open(file) as image:
        return image.size


def read_pixels(file: Path, height: int, width: int | None = None) -> Tensor:
    """(3, height, width) float32 in [-1, 1]: the largest centred part of that shape, resized with Lanczos.

    The part begins at a whole pixel.

    Args:
        width: None: a square of ``height``.
    Raises:
        InputError: the file is missing, no image, or cut off.
    """
    width = width or height
    with _reading(file), Image.open(file) as opened:
        image = opened.convert("RGB")
        across, down = min(image.width, image.height * width / height), min(image.height, image.width * height / width)
        left, top = (image.width - across) // 2, (image.height - down) // 2
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))
        array = numpy.asarray(image, dtype=numpy.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn the exceptions for a damaged file into an InputError that names it."""
    try:
        yield
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"the image {file} cannot be read: {error}", "replace or remove it") from error


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> PIL image."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
