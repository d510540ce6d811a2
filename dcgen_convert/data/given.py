"""The user's pictures: one source or several, each a folder, a list, shards, a data set of the hub or the tiny world.

A folder or list alone stays where it is, and so do its names. Otherwise every source gets a number, and a folder in
``work``: a link to the user's folder, or the pictures that were copied out of shards.

    1/            link to the folder, or to the folder of the list
    2.unpacked/   pictures of shards, with pictures.jsonl and, written last, unpacked.json
    3.scenes-256/ pictures of the tiny world, drawn at 256 px; edits in 3.edits-256/, videos in 3.videos-256-16-8/

For a family that draws videos they are videos: files and folders of frames, in the same forms.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from dcgen_convert.core.disk import check_disk
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import TEMPORARY, atomic_write, fresh_folder, json_text, read_json, write_json
from dcgen_convert.data import drawn, gathering, hub, images, prompt_lists, shards
from dcgen_convert.data.images import Picture
from dcgen_convert.data.sieve import ENOUGH, Sieve
from dcgen_convert.data.tally import Tally

LIST, UNPACKED = ".jsonl", "unpacked.json"
PICTURES = "pictures.jsonl"
ENDLESS = 1 << 40  # pictures of a source that is drawn as it is asked for
HUB_SUFFIXES = (*shards.SUFFIXES, ".txt", LIST, ".csv", ".tsv")


@dataclass(frozen=True)
class PictureSource:
    """where: path or address as the user wrote it; column of the captions; share of the pictures.

    frames: that a video must have; 0: the source is read for pictures. fps: frames a second of the videos that the
    model draws.
    """

    where: str
    column: str | None = None
    share: float | None = None
    frames: int = 0
    fps: float = 0

    @property
    def path(self) -> Path:
        return Path(self.where).expanduser()

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is no path on this machine: a data set of the hub, or pictures that are drawn first."""
        return hub.is_address(self.where) or drawn.side_of(self.where) is not None

    @property
    def moving(self) -> bool:
        """Whether it is read for videos."""
        return self.frames > 0


def parse(text: str, frames: int = 0, fps: float = 0) -> PictureSource:
    """`PATH`, `PATH:COLUMN`, `PATH=SHARE` or `PATH:COLUMN=SHARE`; also with an address of the hub for PATH.

    Args:
        frames, fps: as in PictureSource.
    """
    share = None
    if not Path(text).expanduser().exists() and (found := re.fullmatch(r"(.+)=([0-9]*\.?[0-9]+)", text)):
        text, share = found[1], float(found[2])
        if share <= 0:
            raise InputError(f"the share of {text} is {share:g}", "leave the source out, or give a larger share")
    whole = Path(text).expanduser().exists() or drawn.side_of(text)
    where, column = (text, None) if whole else prompt_lists.split(text)
    return PictureSource(where, column, share, frames, fps)


def parse_all(texts: Sequence[str], frames: int = 0, fps: float = 0) -> list[PictureSource]:
    """The sources, as `parse`; InputError when some have a share and others none."""
    found = [parse(text, frames, fps) for text in texts]
    without = [source.where for source in found if source.share is None]
    if without and len(without) < len(found):
        raise InputError(f"{without[0]} has no share, other sources have", "give every source a share, or none")
    return found


def is_plain(sources: Sequence[PictureSource], work: Path) -> bool:
    """Whether the pictures stay where they are, and ``work`` is not needed."""
    if len(sources) != 1 or sources[0].is_elsewhere or sources[0].share is not None:
        return False
    path = sources[0].path
    if not path.exists():
        return not work.exists()
    return sources[0].column is None and not _shards(path, sources[0].moving)


def _shards(place: Path, moving: bool = False) -> list[Path]:
    """The shards of a source. A folder that holds pictures too is a folder of pictures; the same of videos."""
    found = [] if place.suffix.lower() == LIST else shards.find(place)
    return [] if found and place.is_dir() and gathering.gather(place, moving)[0] else found


def shard_bytes(sources: Sequence[PictureSource]) -> int:
    """Bytes of the shards on this machine: what their pictures need in the run folder, at most."""
    here = [source for source in sources if not source.is_elsewhere and source.path.exists()]
    return sum(shard.stat().st_size for source in here for shard in _shards(source.path, source.moving))


def require_here(sources: Sequence[PictureSource]) -> None:
    """InputError for a source that is not on this machine; those of the hub are found out later."""
    for source in sources:
        if not source.is_elsewhere and not source.path.exists():
            raise InputError(
                f"no pictures: {source.where} does not exist", "correct --data, or data.path in the recipe"
            )


def are_here(sources: Sequence[PictureSource]) -> bool:
    """Whether all sources on this machine are there; those of the hub are found out later."""
    return all(source.is_elsewhere or source.path.exists() for source in sources)


def require_large(sources: Sequence[PictureSource], sieve: Sieve) -> None:
    """InputError when there are none, or too few pass ``sieve``. Those on the hub and in shards are found out later."""
    passed = 0
    for source in sources:
        if source.is_elsewhere or _shards(source.path, source.moving):
            return
        files = _files(source.path, source.moving)
        if not files:
            images.gather(source.path, source.column, moving=source.moving)  # which says what is wrong
        for file in files:
            passed += sieve.passes(file)
            if passed == ENOUGH:
                return
    sieve.require(passed)


def held(sources: Sequence[PictureSource], most: int, sieve: Sieve) -> int | None:
    """How many pictures `take` would find, ``most`` at the most; None: some are elsewhere, or missing.

    Pictures in shards all count: they are measured when they are copied out.
    """
    sizes = [_size(source, most, sieve) for source in sources]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    shares = [source.share for source in sources if source.share is not None]
    if shares:
        return int(min(most, *(size * sum(shares) / share for size, share in zip(known, shares, strict=True))))
    return min(most, sum(known))


def most_references(sources: Sequence[PictureSource]) -> int:
    """Most references that a picture on this machine has. Of shards the first samples count."""
    places = [source.path for source in sources if not source.is_elsewhere and source.path.exists()]
    counts = [_longest(path, path.stat().st_mtime_ns) for path in places]
    return max([*counts, *(int(drawn.holds_edits(source.where)) for source in sources)], default=0)


@cache
def _longest(path: Path, written: int) -> int:  # noqa: ARG001  what was written again is read again
    if path.suffix == LIST:
        return max(len(one.references) for one in images.read_folder(path))
    if found := _shards(path):
        return max(map(shards.most_references, found))
    return max(map(len, images.sources(path, gathering.gather(path)[0]).values()), default=0)


def _size(source: PictureSource, most: int, sieve: Sieve) -> int | None:
    if drawn.side_of(source.where) is not None:
        return ENDLESS
    if source.is_elsewhere or not source.path.exists():
        return None
    if found := _shards(source.path, source.moving):
        return sum(map(shards.count, found))
    return sum(1 for _ in islice(filter(sieve.passes, _files(source.path, source.moving)), most))


def _files(path: Path, moving: bool) -> list[Path]:
    """The pictures of a folder or of a list; those without a caption that others were made from are none."""
    if path.suffix == LIST:
        return [one.file for one in images.read_folder(path)]
    files = gathering.gather(path, moving)[0]
    named = {source for own in images.sources(path, files).values() for source in own}
    return [file for file in files if file not in named or gathering.caption_file(file)]


def take(
    sources: Sequence[PictureSource],
    count: int,
    work: Path,
    offline: bool = False,
    sieve: Sieve | None = None,
    edited: bool = False,
) -> tuple[list[Picture], str]:
    """At most ``count`` pictures of all sources, and what is taken and what is left out, in words.

    With shares as many pictures are taken as the shares allow: a source that is too small makes all smaller.

    Args:
        sieve: leaves small pictures out; None: none is too small.
        edited: whether to look for what the pictures were made from too.
    Raises:
        InputError: a source cannot be used. AccessError: it is on the hub and cannot be had.
        ResourceError: the disk has no room for the pictures of shards.
    """
    require_here(sources)
    if is_plain(sources, work):
        return images.take(sources[0].path, count, sieve, edited, sources[0].moving)
    work.mkdir(parents=True, exist_ok=True)
    opened = [_Opened(source, number, work, offline, edited) for number, source in enumerate(sources, 1)]
    shares = [source.share for source in sources if source.share is not None]
    quotas = [count] * len(opened)
    if shares:
        parts = [share / sum(shares) for share in shares]
        total = min(count, *(one.size / part for one, part in zip(opened, parts, strict=True)))
        quotas = [round(total * part) for part in parts]
    pictures: list[Picture] = []
    told = []
    for one, quota in zip(opened, quotas, strict=True):
        found, left_out = one.take(quota, sieve)
        pictures += found
        rest = f", {left_out.total} left out {left_out.reasons()}" if left_out.total else ""
        told.append(f"{one.source.where} {len(found)} of {one.size} {one.noun}{rest}")
    kept = images.chosen(pictures, count, work)
    return kept, f"{len(kept)} {opened[0].noun} taken: {'; '.join(told)}"


class _Opened:
    """A source that was found: how many pictures it has, and the chosen ones."""

    def __init__(self, source: PictureSource, number: int, work: Path, offline: bool, edited: bool) -> None:
        self.source, self.work, self.number, self.edited = source, work, number, edited
        self.place = source.path
        self.noun = images.NOUNS[3 if source.moving else 2]
        self.shards: list[Path] = []
        self.side = drawn.side_of(source.where)
        if self.side:
            self.size = ENDLESS
            return
        if hub.is_address(source.where):
            self.place = hub.fetch(source.where, {*HUB_SUFFIXES, *gathering.suffixes(source.moving)}, offline)
        self.shards = _shards(self.place, source.moving)
        if self.shards:
            self.counts = [shards.count(shard) for shard in self.shards]
            self.size = sum(self.counts)
            return
        self.every, self.left_out = images.gather(self._link(), source.column, edited, source.moving)
        self.size = len(self.every)

    def take(self, quota: int, sieve: Sieve | None) -> tuple[list[Picture], Tally]:
        """At most ``quota`` pictures, those of the smallest hashes of names: more of them hold the same ones."""
        if self.side:
            self.size = quota
            where, moving = self.source.where, (self.source.frames, self.source.fps)
            folder = self.work / f"{self.number}.{drawn.folder_name(where, *moving)}"
            every, left_out = drawn.draw(folder, where, quota, self.edited, *moving), Tally()
        else:
            every, left_out = self._unpack(quota) if self.shards else (self.every, self.left_out)
        before = set(sieve.dropped) if sieve else set()
        pictures = images.chosen(every, quota, self.work, sieve)
        for file in sieve.dropped if sieve else ():
            if sieve and file not in before:
                left_out.add(sieve.reason(file), file.name)
        return pictures, left_out

    def _link(self) -> Path:
        """The user's folder as a folder of ``work``; of a list, the list in it."""
        target = (self.place if self.place.is_dir() else self.place.parent).absolute()
        link = self.work / str(self.number)
        if not link.is_symlink() or os.readlink(link) != str(target):
            temporary = link.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}")
            temporary.symlink_to(target)
            os.replace(temporary, link)
        return link if self.place.is_dir() else link / self.place.name

    def _unpack(self, quota: int) -> tuple[list[Picture], Tally]:
        folder = self.work / f"{self.number}.unpacked"
        root = self.place if self.place.is_dir() else self.place.parent
        stats = [(shards.label(shard, root), shard.stat()) for shard in self.shards]
        made_from = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        kinds = {name: True for name, of in (("edited", self.edited), ("moving", self.source.moving)) if of}
        key = {"shards": made_from, "column": self.source.column, **kinds}
        record = read_json(folder / UNPACKED) if (folder / UNPACKED).exists() else {}
        if record.get("key") != key:
            fresh_folder(folder)
        elif record["quota"] == quota:
            return images.read_folder(folder / PICTURES), Tally(**record["left_out"])
        write_json(folder / UNPACKED, {"key": key, "quota": None})  # what is copied already stays
        check_disk(
            [(folder, sum(stat.st_size for _, stat in stats) * min(1.0, quota / max(1, self.size)))], "--run-dir"
        )
        left_out, rows = Tally(), []
        wanted = self._wanted([name for name, _ in stats], quota)
        for shard, (name, _), numbers in zip(self.shards, stats, wanted, strict=True):
            if numbers:
                column, place = self.source.column, folder / name
                for file, caption, sources in shards.extract(shard, numbers, place, column, left_out, **kinds):
                    made = {images.SOURCE: [f"{name}/{source}" for source in sources]} if sources else {}
                    rows.append(json_text({"file": f"{name}/{file}", "caption": caption, **made}))
        if not rows:
            why = f": {left_out.reasons()}" if left_out.total else ""
            raise InputError(
                f"{self.source.where} holds no {self.noun[:-1]} with a caption{why}", "see the page on pictures"
            )
        atomic_write(folder / PICTURES, "\n".join(rows) + "\n")
        os.sync()
        write_json(folder / UNPACKED, {"key": key, "quota": quota, "left_out": vars(left_out)})
        return images.read_folder(folder / PICTURES), left_out

    def _wanted(self, names: list[str], quota: int) -> list[set[int]]:
        """The numbers of the chosen samples in each shard."""

        def order(place: tuple[int, int]) -> bytes:
            return hashlib.sha256(f"{names[place[0]]}/{place[1]:07d}".encode()).digest()

        places = ((shard, number) for shard, count in enumerate(self.counts) for number in range(count))
        found: list[set[int]] = [set() for _ in names]
        for shard, number in heapq.nsmallest(quota, places, key=order) if quota < self.size else places:
            found[shard].add(number)
        return found
