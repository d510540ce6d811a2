"""Pictures on disk, one file each, under the hash of all that they depend on. What is there and whole is not drawn
again.

    OUT/pictures/converted-1f2e3d4c5b6a/   what drew them: title, and hash of model, steps, guidance, side and the like
      about.json                           the same in words
      7-0a1b2c3d4e5f.png                   seed, and hash of the prompt; of an edit also of the picture that is edited.
                                           A video is an .mkv without loss
      index-0.jsonl                        SHA-256 of each file that rank 0 wrote
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dcgen_convert.core.console import Console
from dcgen_convert.core.files import hashes, json_text, write_json
from dcgen_convert.core.journal import fingerprint
from dcgen_convert.data import contents, images
from dcgen_convert.data.buckets import Size
from dcgen_convert.data.edit_prompts import Edit


@dataclass(frozen=True)
class Gallery:
    """The pictures of one set.

    Attributes:
        root: folder of all galleries. title: what the set is, a short word.
        about: all that a picture depends on beside its prompt and its seed, as plain data.
        prompts, seeds: of the pictures, in order.
        edits: of a model that edits, what each prompt is given; else empty.
        fps: frames a second of a video.
    """

    root: Path
    title: str
    about: dict[str, Any]
    prompts: list[str]
    seeds: list[int]
    edits: list[Edit] = field(default_factory=list)
    fps: float = 0

    @property
    def folder(self) -> Path:
        return self.root / f"{self.title.replace(' ', '-')}-{fingerprint(self.about)[:12]}"

    @property
    def size(self) -> Size:
        """(height, width) in px of each picture."""
        side = int(self.about["side"])
        return side, int(self.about.get("width", side))

    @property
    def frames(self) -> int:
        """Of each video; 0: they are pictures."""
        return int(self.about.get("frames", 0))

    def __len__(self) -> int:
        return len(self.prompts)

    def file(self, place: int) -> Path:
        asked = self.prompts[place] + (f" {self.edits[place].digest}" if self.edits else "")
        prompt = hashlib.sha256(asked.encode()).hexdigest()
        return self.folder / f"{self.seeds[place]}-{prompt[:12]}{contents.suffix(self.frames > 0)}"

    def missing(self, console: Console) -> list[int]:
        """The places whose picture is not there. A file that is not as it was written is said to be damaged."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "about.json", self.about)
        known = self._index()
        there = [place for place in range(len(self)) if self.file(place).is_file()]
        found = dict(zip(there, hashes(self.file(place) for place in there), strict=True))
        whole = set()
        for place, digest in found.items():
            file = self.file(place)
            if digest in known.get(file.name, ()):
                whole.add(place)
            elif file.name in known:
                console.warn(f"{file} is damaged: it is drawn again")
        return [place for place in range(len(self)) if place not in whole]

    def add(self, place: int, pixels: Tensor, rank: int) -> None:
        """Keep a picture, (3, H, W) in [-1, 1], or a video, (3, F, H, W). The file first, then its hash: a kill between
        costs one picture.
        """
        file = self.file(place)
        contents.write(pixels, file, self.fps)
        line = json_text({"file": file.name, "sha256": hashes([file])[0]}) + "\n"
        with open(self.folder / f"index-{rank}.jsonl", "ab+") as index:
            if index.tell() and os.pread(index.fileno(), 1, index.tell() - 1) != b"\n":
                line = f"\n{line}"  # after a line that a kill cut off
            index.write(line.encode())

    def _index(self) -> dict[str, set[str]]:
        """Name of a file -> the hashes that were written down for it. A line that a kill cut off is left out."""
        known: dict[str, set[str]] = {}
        for path in sorted(self.folder.glob("index-*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                    known.setdefault(record["file"], set()).add(record["sha256"])
                except (ValueError, KeyError, TypeError):
                    continue
        return known

    def keys(self) -> list[str]:
        """SHA-256 of every picture's file."""
        return hashes(self.file(place) for place in range(len(self)))

    def references(self, places: Sequence[int], size: Size) -> list[list[Tensor]]:
        """What is given at each of ``places``, (3, *size) in [-1, 1] each; empty without edits."""
        return images.read_references([self.edits[place].files for place in places] if self.edits else [], *size)

    def stream(self, places: Sequence[int], size: Size) -> Iterator[Tensor]:
        """The pictures at ``places``, (3, *size) in [-1, 1] each; videos, (3, frames, *size)."""
        whole = (self.frames, *size) if self.frames else size
        return (contents.read(self.file(place), [whole])[0] for place in places)
