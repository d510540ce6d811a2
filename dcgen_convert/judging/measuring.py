"""Measuring sets of pictures, on one rank or on several. What was measured is kept, a file for each group of pictures:

    OUT/pictures/converted-1f2e3d4c5b6a/measured/   beside the pictures; those of references in a folder of their own
      cmmd-0a1b2c3d4e5f.safetensors                 features (B, D) or scores (B,) of a group, under the hash of the
                                                    pictures, the captions, the measure and its weights

Rank 0 says what is missing; every rank measures its part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dcgen_convert.core import pulse
from dcgen_convert.core.console import Console
from dcgen_convert.core.files import atomic_save, sealed
from dcgen_convert.core.journal import fingerprint
from dcgen_convert.data import references
from dcgen_convert.data.buckets import Size
from dcgen_convert.data.references import together
from dcgen_convert.evaluation import measures
from dcgen_convert.evaluation.measure import EditScore, Measure, Weights
from dcgen_convert.evaluation.pixels import through_jpeg
from dcgen_convert.evaluation.rows import Figures, of_batch
from dcgen_convert.judging.gallery import Gallery
from dcgen_convert.networks.at_once import release
from dcgen_convert.ranks.crew import Crew

TASK = "measure"
FOLDER = "measured"
VERSION = 1  # a higher number when a measure gives other numbers than before
VALUES = "values"


@dataclass(frozen=True)
class Judges:
    """The measures, and how pictures are shown to them. It is plain data, so that every rank can make the same.

    Attributes:
        names: of the measures. weights: where their networks lie. texts: all prompts.
        size: (height, width) in px at which pictures are measured. device: where networks run. offline: fetch nothing.
        edited: the pictures are edits. frames: of each video; 0: they are pictures.
    """

    names: list[str]
    weights: Weights
    texts: list[str]
    size: Size
    device: str
    offline: bool
    edited: bool = False
    frames: int = 0

    def made(self) -> dict[str, Measure]:
        """Name -> measure."""
        settings = {key: getattr(self, key) for key in ("device", "offline", "edited")}
        settings |= {"side": min(self.size), "moving": self.frames > 0}
        return {one.name: one for one in measures.chosen(self.names, self.weights, self.texts, **settings)[0]}


@dataclass(frozen=True)
class Set:
    """Pictures of one kind: a gallery, or the name of given references; the folder of what is kept of them.

    jpeg: whether they go through JPEG before they are measured.
    """

    pictures: Gallery | str
    folder: Path
    jpeg: bool

    def keys(self) -> list[str]:
        """A hash for each picture, of its bytes."""
        return self.pictures.keys() if isinstance(self.pictures, Gallery) else references.read(self.pictures).keys()

    def captions(self, places: Sequence[int]) -> list[str]:
        """Of the pictures at ``places``; empty for references, which are not scored."""
        return [self.pictures.prompts[place] for place in places] if isinstance(self.pictures, Gallery) else []

    def edits(self, places: Sequence[int]) -> list[str]:
        """Hashes of what was edited at ``places``; empty for pictures that are no edits."""
        edits = self.pictures.edits if isinstance(self.pictures, Gallery) else []
        return [edits[place].digest for place in places] if edits else []

    def edited(self, places: Sequence[int], size: Size) -> Tensor | None:
        """The first of the pictures that were edited at each of ``places``, (B, 3, *size) in [-1, 1]; None for pictures
        that are no edits.
        """
        found = self.pictures.references(places, size) if isinstance(self.pictures, Gallery) else []
        return torch.stack([own[0] for own in found]) if found else None

    def batches(self, groups: Sequence[Sequence[int]], size: Size) -> Iterator[Tensor]:
        """The pictures of every group, (B, 3, *size) in [-1, 1], as the measures see them. Given ones are squares."""
        if isinstance(self.pictures, Gallery):
            stream = self.pictures.stream([place for group in groups for place in group], size)
        else:
            stream = references.read(self.pictures).stream([place for group in groups for place in group], min(size))
        for group in groups:
            pixels = torch.stack([next(stream) for _ in group])
            yield through_jpeg(pixels) if self.jpeg else pixels


@dataclass(frozen=True)
class Unmeasured:
    """Pictures that are to be measured together: their places, and the file of each measure that is missing."""

    places: list[int]
    missing: dict[str, Path]


@dataclass(frozen=True)
class Remaining:
    """What is missing of a set."""

    of: Set
    groups: list[Unmeasured]

    def part(self, crew: Crew) -> Remaining:
        """What one rank does of it: every `world`-th group."""
        return replace(self, groups=self.groups[crew.rank :: crew.world])


def measured(
    sets: Mapping[str, Set], judges: Judges, made: Mapping[str, Measure], crew: Crew, console: Console
) -> dict[str, Figures]:
    """What the measures say of every set. What is kept and whole is not computed again.

    Args:
        made: the measures of ``judges`` by name, on this rank.
    """
    files = {name: _files(one, judges, made) for name, one in sets.items()}
    known: dict[Path, Tensor] = {}
    shares = [Remaining(sets[name], _missing(groups, known, console)) for name, groups in files.items()]
    if shares := [share for share in shares if share.groups]:
        total = sum(len(group.places) for share in shares for group in share.groups)
        with (
            console.progress("evaluate: measuring", total, "pictures") as bar,
            crew.share(TASK, bar, together=False, shares=shares, judges=judges),
        ):
            work(shares, judges, crew, bar, made)
        release()
    for share in shares:
        known |= {file: load_file(file)[VALUES] for group in share.groups for file in group.missing.values()}
    return {name: _joined(groups, known, made) for name, groups in files.items()}


Files = list[tuple[list[int], dict[str, Path]]]  # places of a group, and measure -> file


def _files(one: Set, judges: Judges, made: Mapping[str, Measure]) -> Files:
    """The groups of a set, whatever the number of ranks, with the file of every measure."""
    height, width = judges.size
    keys, size = one.keys(), max(1, together(height, width) // max(1, judges.frames))
    shape = height if height == width else [height, width]  # a square as it was always told
    about = {name: [VERSION, name, measure.made_of(), shape, one.jpeg] for name, measure in made.items()}
    found: Files = []
    for start in range(0, len(keys), size):
        places = list(range(len(keys)))[start : start + size]
        captions, seen = one.captions(places), [keys[place] for place in places]
        edits = [one.edits(places)]
        named = {
            name: fingerprint(
                [about[name], seen, captions if measure.kind == "score" else []]
                + (edits if isinstance(measure, EditScore) else [])
            )
            for name, measure in made.items()
            if captions or measure.kind != "score"
        }
        files = {name: one.folder / f"{name}-{digest[:24]}.safetensors" for name, digest in named.items()}
        found.append((places, files))
    return found


def _missing(groups: Files, known: dict[Path, Tensor], console: Console) -> list[Unmeasured]:
    """The groups of which a file is missing or damaged; the values of the others go to ``known``."""
    found = []
    for places, files in groups:
        missing = {}
        for name, file in files.items():
            values = _kept(file, len(places))
            if values is None:
                missing[name] = file
                if file.exists():
                    console.warn(f"{file} is damaged: its pictures are measured again")
            else:
                known[file] = values
        if missing:
            found.append(Unmeasured(places, missing))
    return found


def _kept(file: Path, count: int) -> Tensor | None:
    """The values of ``count`` pictures in a file; None where it is not there, or not as it was written."""
    if not file.exists():
        return None
    try:
        values = load_file(file).get(VALUES) if sealed(file) else None
    except (SafetensorError, OSError):
        return None
    return values if values is not None and len(values) == count else None


def work(
    shares: Sequence[Remaining], judges: Judges, crew: Crew, bar: Any, made: Mapping[str, Measure] | None = None
) -> None:
    """This rank's part of all shares. made: the measures, where they are there already."""
    own = [part for part in (share.part(crew) for share in shares) if part.groups]
    if not own:
        return
    made = made or judges.made()
    for part in own:
        part.of.folder.mkdir(parents=True, exist_ok=True)
        batches = part.of.batches([group.places for group in part.groups], judges.size)
        for group, pixels in zip(part.groups, batches, strict=True):
            captions, sources = part.of.captions(group.places), part.of.edited(group.places, judges.size)
            for name, file in group.missing.items():
                atomic_save({VALUES: of_batch(made[name], pixels, captions, sources)}, file)
                pulse.bump()
            bar.advance(len(group.places))


def _joined(groups: Files, known: Mapping[Path, Tensor], made: Mapping[str, Measure]) -> Figures:
    """The values of all groups, in order."""
    found: dict[str, list[Tensor]] = {}
    for _, files in groups:
        for name, file in files.items():
            found.setdefault(name, []).append(known[file])
    whole = {name: torch.cat(parts) for name, parts in found.items()}
    whole = {name: values.flatten(0, 1) if values.ndim == 3 else values for name, values in whole.items()}
    scores = {name: values for name, values in whole.items() if made[name].kind == "score"}
    return Figures(scores, {name: values for name, values in whole.items() if name not in scores})
