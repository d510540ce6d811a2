"""Captioned pictures: an index of files, read and cropped to the size that is asked for.

index.jsonl   one object per picture: {"file", "caption", "seed"}; relative files lie beside the index
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_write, json_text, read_lines, read_text
from dcgen_convert.data import decoding, gathering
from dcgen_convert.data.tally import Tally

INDEX = "index.jsonl"
EXAMPLE = '{"file": "images/fox.png", "caption": "a red fox"}'


@dataclass(frozen=True)
class Picture:
    file: Path
    caption: str
    seed: int | None = None


def read_folder(path: Path) -> list[Picture]:
    """The pictures of `gather`, all of them."""
    return gather(path)[0]


def take(path: Path, count: int) -> tuple[list[Picture], str]:
    """At most ``count`` pictures of `gather`, and a sentence that says what is taken, and what is left out and why."""
    every, left_out = gather(path)
    root = path.expanduser().absolute()
    root = root if root.is_dir() else root.parent
    pictures = chosen(every, count, root)
    kept = set(pictures)
    for picture in every:
        if picture not in kept:
            left_out.add(f"because data.count is {count}", os.path.relpath(picture.file, root))
    told = f"{len(pictures)} {f'of {len(every)} ' if len(every) > count else ''}pictures taken"
    if left_out.total:
        told += f", {left_out.total} left out {left_out.reasons()}"
    return pictures, told


def gather(path: Path) -> tuple[list[Picture], Tally]:
    """Pictures of a folder with a .txt caption beside each, or of a .jsonl with "file" and "caption"; what is left out.

    Raises:
        InputError: nothing there, no pictures, or pictures without captions (named).
    """
    path = Path(path).expanduser().absolute()  # what is written into an index lies beside it or is absolute
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise InputError(f"{path} does not exist", "give a folder of images with .txt captions, or a .jsonl")
        return _read_jsonl(path), Tally()
    if not path.is_dir():
        raise InputError(f"{path} is not a folder", "give a folder of images with .txt captions, or a .jsonl")
    files, left_out = gathering.gather(path)
    if not files:
        why = f"; {left_out.total} left out {left_out.reasons()}" if left_out.total else ""
        raise InputError(
            f"{path} holds no images ({', '.join(sorted(decoding.suffixes()))}){why}",
            "give a folder of images with .txt captions",
        )
    captions = [gathering.caption_file(file) for file in files]
    bare = [file for file, caption in zip(files, captions, strict=True) if caption is None]
    if bare:
        raise InputError(
            f"{len(bare)} of {len(files)} images have no caption, first {bare[0]}",
            f"write {bare[0].with_suffix('.txt').name} beside it",
        )
    pictures = [Picture(file, read_text(text).strip()) for file, text in zip(files, captions, strict=True) if text]
    return pictures, left_out


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
    for key in ("file", "caption"):
        if key not in record:
            raise ValueError(f"it has no {key}")
        if not isinstance(record[key], str):
            raise ValueError(f"{key} must be a text, not {json.dumps(record[key])[:60]}")
    file, caption, seed = record["file"], record["caption"], record.get("seed")
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
        found = gathering.gather(path)[0]
        files = [*found, *(text for file in found if (text := gathering.caption_file(file)))]
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
        rows.append(json_text({"file": str(file), "caption": picture.caption, "seed": picture.seed}))
    atomic_write(folder / name, "\n".join(rows) + "\n")


def chosen(pictures: list[Picture], count: int, root: Path) -> list[Picture]:
    """``count`` of the pictures, in their order, from everywhere in the data: those of the smallest hashes of names.

    A larger count chooses the same ones and more. Names are relative to ``root``, so the data may be moved.
    """
    if len(pictures) <= count:
        return pictures

    def key(number: int) -> bytes:
        return hashlib.sha256(os.fsencode(os.path.relpath(pictures[number].file, root))).digest()

    return [pictures[number] for number in sorted(sorted(range(len(pictures)), key=key)[:count])]


def size_of(file: Path) -> tuple[int, int]:
    """(width, height) in px of the picture as it is shown, from the file's header where that is enough.

    Raises:
        InputError: the file is missing or no image.
    """
    with decoding.opened(file) as image:
        return decoding.shown_size(image)


def read_pixels(file: Path, height: int, width: int | None = None) -> Tensor:
    """(3, height, width) float32 in [-1, 1]: the largest centred part of that shape, resized with Lanczos.

    The part begins at a whole pixel.

    Args:
        width: None: a square of ``height``.
    Raises:
        InputError: the file is missing, no image, or cut off.
    """
    width = width or height
    image, _ = decoding.decode(file)
    across, down = min(image.width, image.height * width / height), min(image.height, image.width * height / width)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))
    array = numpy.asarray(image, dtype=numpy.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> PIL image."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
