"""Captioned pictures: an index of files, read and cropped to the size that is asked for.

index.jsonl   one object per picture: {"file", "caption", "seed"}; relative files lie beside the index. An edited
              picture has "source" too, the picture that it was made from, or a list of them

For a family that draws videos the file of a row is a video, see `videos`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_write, json_text, read_lines, read_text, replacing, understood
from dcgen_convert.core.pixels import fitted, to_image
from dcgen_convert.data import beside, decoding, gathering, metadata
from dcgen_convert.data.sieve import Sieve
from dcgen_convert.data.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.jsonl"
EXAMPLE = '{"file": "images/fox.png", "caption": "a red fox"}'
CAPTION = "caption"  # key of the captions in an index or a list
SOURCE, SOURCE_SHA256 = (
    beside.SOURCE,
    f"{beside.SOURCE}_sha256",
)  # keys of what an edited picture was made from: a text or a list
NOUNS = {2: "pictures", 3: "videos"}  # what rows are, by the axes of a latent
ROWS = "rows.jsonl"  # beside the latents: the pictures in the order of their rows


@dataclass(frozen=True)
class Picture:
    """file, of a video also a folder of its frames; caption; seed of one that was drawn; sha256 of the file's bytes
    where it was asked for.

    references: of an edited picture, the files that it was made from; references_sha256: of their bytes, if asked for.
    """

    file: Path
    caption: str
    seed: int | None = None
    sha256: str | None = None
    references: tuple[Path, ...] = ()
    references_sha256: tuple[str, ...] = ()


def read_folder(path: Path) -> list[Picture]:
    """The pictures of `gather`, all of them."""
    return gather(path)[0]


def take(
    path: Path, count: int, sieve: Sieve | None = None, edited: bool = False, moving: bool = False
) -> tuple[list[Picture], str]:
    """At most ``count`` pictures of `gather`, and a sentence that says what is taken, and what is left out and why.

    Args:
        sieve: leaves small pictures out; None: none is too small. edited, moving: as `gather` takes them.
    """
    every, left_out = gather(path, edited=edited, moving=moving)
    root = path.expanduser().absolute()
    root = root if root.is_dir() else root.parent
    pictures = chosen(every, count, root, sieve)
    kept = set(pictures)
    for picture in every:
        if picture not in kept:
            why = (sieve.reason(picture.file) if sieve else "") or f"because data.count is {count}"
            left_out.add(why, os.path.relpath(picture.file, root))
    told = (
        f"{len(pictures)} {f'of {len(every)} ' if len(every) > len(pictures) else ''}{NOUNS[3 if moving else 2]} taken"
    )
    if left_out.total:
        told += f", {left_out.total} left out {left_out.reasons()}"
    return pictures, told


def gather(
    path: Path, column: str | None = None, edited: bool = False, moving: bool = False
) -> tuple[list[Picture], Tally]:
    """Pictures of a folder, or of a .jsonl with "file" and "caption"; and what is left out.

    The captions of a folder stand in a .txt beside each picture, or in the tables that `metadata` reads.

    Args:
        column: name of the captions in the .jsonl or in the tables; None: the usual ones.
        edited: whether to look for what the pictures of a folder were made from, in files and tables.
        moving: whether to take videos, files and folders of frames, and no pictures.
    Raises:
        InputError: nothing there, no pictures, or pictures without captions (named).
    """
    path = Path(path).expanduser().absolute()  # what is written into an index lies beside it or is absolute
    noun = "videos" if moving else "images"
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise InputError(f"{path} does not exist", f"give a folder of {noun} with .txt captions, or a .jsonl")
        return _read_jsonl(path, column or CAPTION), Tally()
    if not path.is_dir():
        raise InputError(f"{path} is not a folder", f"give a folder of {noun} with .txt captions, or a .jsonl")
    files, left_out = gathering.gather(path, moving)
    if not files:
        why = f"; {left_out.total} left out {left_out.reasons()}" if left_out.total else ""
        raise InputError(
            f"{path} holds no {noun} ({', '.join(sorted(gathering.suffixes(moving)))}){why}",
            f"give a folder of {noun} with .txt captions",
        )
    texts = {file: read_text(text).strip() for file in files if (text := gathering.caption_file(file))}
    made_from = sources(path, files) if edited else {}
    named = {source for own in made_from.values() for source in own}
    if column or any(file not in texts and file not in named for file in files):
        texts = metadata.captions(path, files, column) | ({} if column else texts)
    files = [file for file in files if file in texts or file not in named]  # a source alone is no picture to learn
    bare = [file for file in files if file not in texts]
    if bare:
        raise InputError(
            f"{len(bare)} of {len(files)} {noun} have no caption, first {bare[0]}",
            f"write {bare[0].with_suffix('.txt').name} beside it, or metadata.jsonl with file_name and caption",
        )
    return [Picture(file, texts[file], references=made_from.get(file, ())) for file in files], left_out


def sources(folder: Path, files: Sequence[Path]) -> dict[Path, tuple[Path, ...]]:
    """Picture -> what it was made from, of the ``files`` of a folder: by their names, or by its tables."""
    return beside.of_files(files) | metadata.sources(folder, files)


def _read_jsonl(path: Path, column: str) -> list[Picture]:
    pictures = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            pictures.append(_picture(json.loads(line), path.parent, column))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} cannot be used: {error}", f"write {EXAMPLE}") from error
    if not pictures:
        raise InputError(f"{path} lists no images", f"write one line per picture: {EXAMPLE}")
    return pictures


def _picture(record: object, folder: Path, column: str = CAPTION) -> Picture:
    """The picture of one line of a .jsonl in ``folder``; ValueError says what is wrong with the line."""
    if not isinstance(record, dict):
        raise ValueError("it is no object with file and caption")
    if "file" not in record and (key := next((key for key in ("image", "video") if key in record), None)):
        record = {**record, "file": record[key]}
    for key in ("file", column):
        if key not in record:
            raise ValueError(f"it has no {key}")
        if not isinstance(record[key], str):
            raise ValueError(f"{key} must be a text, not {json.dumps(record[key])[:60]}")
    file, caption, seed = record["file"], record[column], record.get("seed")
    if not isinstance(seed, int | None) or isinstance(seed, bool):
        raise ValueError(f"seed must be a whole number, not {json.dumps(seed)[:60]}")
    caption.encode()  # half of a surrogate pair is no text
    return Picture(folder / file, caption, seed, references=tuple(folder / name for name in _texts(record, SOURCE)))


def _texts(record: dict[str, Any], key: str) -> tuple[str, ...]:
    """One text or a list of them; empty for all else, which only a model that edits refuses."""
    value = record.get(key)
    values = value if isinstance(value, list) else [value]
    texts = tuple(one for one in values if isinstance(one, str))
    return texts if len(texts) == len(values) else ()


def write_index(
    path: Path, pictures: list[Picture], root: Path, marks: Mapping[int, Mapping[str, Any]] | None = None
) -> None:
    """Write an index whose files are relative to ``root`` where they lie in it; `read_index` takes the same root.

    Args:
        marks: what else is said of a picture, by its place; for `read_mark`.
    """
    rows = []
    for place, picture in enumerate(pictures):
        file, *sources = (
            str(one.relative_to(root) if one.is_relative_to(root) else one)
            for one in (picture.file, *picture.references)
        )
        row = {"file": file, "caption": picture.caption, "seed": picture.seed, "sha256": picture.sha256}
        edited = {SOURCE: _folded(sources), SOURCE_SHA256: _folded(picture.references_sha256)} if sources else {}
        rows.append(json_text({**row, **edited, **(marks or {}).get(place, {})}))
    atomic_write(path, "\n".join(rows) + "\n")


def _folded(values: Sequence[str]) -> str | list[str] | None:
    """What `_texts` reads: one text as it is, several as a list."""
    return values[0] if len(values) == 1 else [*values] or None


def read_index(path: Path, root: Path) -> list[Picture]:
    """The pictures that `write_index` wrote. ``root`` may have moved since. InputError when it is damaged."""
    with understood(path, "make its stage again with --from"):
        records = [json.loads(line) for line in read_lines(path) if line]
        pictures = [_picture(record, root) for record in records]
        return [
            replace(one, sha256=record["sha256"], references_sha256=_texts(record, SOURCE_SHA256))
            for one, record in zip(pictures, records, strict=True)
        ]


def read_mark(path: Path, name: str, without: Any) -> list[Any]:
    """The mark ``name`` of every picture of an index, or ``without`` where it has none."""
    with understood(path, "make its stage again with --from"):
        return [json.loads(line).get(name, without) for line in read_lines(path) if line]


def chosen(pictures: list[Picture], count: int, root: Path, sieve: Sieve | None = None) -> list[Picture]:
    """``count`` of the pictures, in their order, from everywhere in the data: those of the smallest hashes of names.

    A larger count chooses the same ones and more. Names are relative to ``root``, so the data may be moved. What does
    not pass ``sieve`` does not count.
    """
    if len(pictures) <= count:
        return [picture for picture in pictures if sieve is None or sieve.passes(picture.file)]

    def key(number: int) -> bytes:
        return hashlib.sha256(os.fsencode(os.path.relpath(pictures[number].file, root))).digest()

    order = sorted(range(len(pictures)), key=key)
    passing = (number for number in order if sieve is None or sieve.passes(pictures[number].file))
    return [pictures[number] for number in sorted(islice(passing, count))]


def size_of(file: Path) -> tuple[int, int]:
    """(width, height) in px of the picture as it is shown, from the file's header where that is enough.

    Raises:
        InputError: the file is missing or no image.
    """
    with decoding.opened(file) as image:
        return decoding.shown_size(image)


def read_pixels(file: Path, height: int, width: int | None = None) -> Tensor:
    """(3, height, width) float32 in [-1, 1]: the picture in a file as `fitted`.

    Args:
        width: None: a square of ``height``.
    Raises:
        InputError: the file is missing, no image, or cut off.
    """
    return read_sizes(file, [(height, width or height)])[0]


def read_references(files: Iterable[Sequence[Path]], height: int, width: int | None = None) -> list[list[Tensor]]:
    """The references of each prompt, (3, height, width) each, as `read_pixels`."""
    return [[read_pixels(file, height, width) for file in own] for own in files]


def read_sizes(file: Path, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The picture in a file, read once, at several sizes (height, width); else as `read_pixels`."""
    image, _ = decoding.decode(file)
    return [fitted(image, *size) for size in sizes]


def write(pixels: Tensor, file: Path) -> None:
    """Write pixels, (3, H, W) in [-1, 1], as PNG: the whole file or nothing."""
    with replacing(file) as temporary:
        to_image(pixels).save(temporary, format="PNG", compress_level=1)


def is_whole(file: Path) -> bool:
    """Whether the checksums inside a PNG file are right."""
    try:
        with decoding.opened(file) as image:
            image.verify()
    except InputError:
        return False
    return True
