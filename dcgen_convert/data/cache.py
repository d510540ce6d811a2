"""Paired latents and conditions on disk: safetensors shards, memory-mapped, one row per picture.

index.json                    {"key", "count", "rows_per_shard", "held_out": rows, "paired": rows,
                               "tables": {name: {tensor: shape of one row}}}
<table>-00000.safetensors     tables "target-<px>" {"z"}, "base-<px>" {"z"}, "text" {forward() keywords}, "null" (1 row)
                              of an editing model the first two have {"reference", "reference-2", ...} too
captions.safetensors          {"text": UTF-8 of all captions, "ends": (N,) where each ends}

With aspect-ratio buckets there is one table for each size, "target-<px>-<height>x<width>". Rows that have n references
more than the model must be given have tables of their own, which end in "-more<n>". The index then has "spans": for
every px a list of `buckets.Span`, which says which rows are in which table.

Rows that are paired have latents of the base too: all of them, or those of "paired", if the index has it. The tables
"base-..." hold these rows only, one after the other.

No memory is needed per row: shards and captions are memory-mapped, and the number of open shards is limited. "key" says
what the rows were made from. A cache that was made from something else is refused.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import atomic_save, read_object, understood, write_json
from dcgen_convert.data import buckets
from dcgen_convert.data.buckets import Span
from dcgen_convert.data.held_out import from_everywhere, held_out_rows

INDEX = "index.json"
CAPTIONS = "captions.safetensors"
AGAIN = "make the latents again with --from latents"
OPEN_SHARDS = 4096  # mapped at once; the kernel allows a process 65,530 mappings


class LatentCache:
    """Rows of (z_0, text) for training, read from shards without loading them.

    Attributes:
        spans: rows of one shape each, one span after the other. Rows that are read together must be of one span.
        shapes: (C, h, w) of the target's latents in each span.
    """

    def __init__(
        self,
        folder: Path,
        resolution: int,
        rows: Sequence[int] | None = None,
        encode: Callable[[list[int]], dict[str, Tensor]] | None = None,
        key: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            resolution: picture side in px; with buckets, of the square.
            rows: the rows that this view shows, ascending; None: all.
            encode: rows of the cache -> their condition, for a cache that holds no text embeddings.
            key: what the rows must have been made from; None asks for nothing.
        Raises:
            InputError: the cache is of something else, or holds no latents at that resolution.
        """
        self.folder = Path(folder)
        index = _read_index(self.folder)
        _require_key(self.folder, index.get("key") or {}, key)
        self.shard_rows: int = index["rows_per_shard"]
        self.rows = rows if rows is not None else range(index["count"])
        self._held_out: list[int] = index["held_out"]
        self.resolution = resolution
        bucketed = index["spans"].get(str(resolution))
        self._spans = [Span(*span) for span in bucketed] if bucketed else buckets.whole(index["count"], resolution)
        if f"target-{self._spans[0].table}" not in index["tables"]:
            raise InputError(f"{folder} holds no latents at {resolution} px, only {', '.join(index['tables'])}")
        self._starts = [span.start for span in self._spans]
        self._paired: list[int] | None = index["paired"]
        parts = [span.rows for span in self._spans]
        own = parts if self._paired is None else [within(part, self._paired) for part in parts]
        self._shifts = {"target": _shifts(self._spans, parts), "base": _shifts(self._spans, own)}
        shown = [(span, part) for span in self._spans if (part := within(span.rows, self.rows))]
        self.spans = [part for _, part in shown]
        self.shapes = [tuple(index["tables"][f"target-{span.table}"]["z"]) for span, _ in shown]
        self._open: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self.null = self._shard("null", 0)
        self._encode = encode

    def __len__(self) -> int:
        return len(self.rows)

    def split(self) -> tuple[LatentCache, LatentCache]:
        """(training rows, held-out rows) of the whole cache or of `paired`; see `hold_out`."""
        if isinstance(self.rows, range):
            return self._view(_Others(len(self.rows), self._held_out)), self._view(self._held_out)
        held_out = set(self._held_out)
        training = [row for row in self.rows if row not in held_out]
        return self._view(training), self._view([row for row in self.rows if row in held_out])

    def paired(self) -> LatentCache:
        """The rows of the whole cache that have latents of the base."""
        return self if self._paired is None else self._view(self._paired)

    def _view(self, rows: Sequence[int]) -> LatentCache:
        return LatentCache(self.folder, self.resolution, rows, self._encode)  # the key was checked

    def batch(self, indices: list[int] | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows ``indices`` of one span: z_0 (B, C, h, w) float32 and the condition, a dict of tensors with first
        axis B.
        """
        return self.seen("target", indices)

    def seen(self, name: str, indices: list[int] | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch` as the model on the latents ``name`` ("base" or "target") sees it: so are the references."""
        latents = self._latents(name, indices)
        return latents.pop("z"), {**self.condition(indices), **latents}

    def condition(self, indices: list[int] | Tensor) -> dict[str, Tensor]:
        """Conditions of rows ``indices``, read from the cache or encoded now; without references."""
        if self._encode is None:
            return self.read("text", indices)
        return self._encode([self.rows[int(i)] for i in indices])

    def captions(self, indices: Iterable[int] | Tensor) -> list[str]:
        """Captions of rows ``indices``."""
        return Captions(self.folder).read(self.rows[int(i)] for i in indices)

    def pairs(self, indices: list[int] | Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Latents of the same pictures in both autoencoders, float32: of base and target z, (B, C0, h0, w0) and
        (B, C, h, w), and those of references.
        """
        return self._latents("base", indices), self._latents("target", indices)

    def _latents(self, name: str, indices: list[int] | Tensor) -> dict[str, Tensor]:
        return {key: value.float() for key, value in self.read(name, indices).items()}

    def read(self, name: str, indices: list[int] | Tensor) -> dict[str, Tensor]:
        """Rows of every tensor of the tables called ``name`` ("base", "target", "text"), in the order asked for."""
        parts = []
        with understood(self.folder / INDEX, AGAIN):  # its shards hold fewer rows than it says
            for i in indices:
                table, place = self._place(name, self.rows[int(i)])
                shard = self._shard(table, place // self.shard_rows)
                parts.append({key: tensor[place % self.shard_rows] for key, tensor in shard.items()})
        return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}

    def _place(self, name: str, row: int) -> tuple[str, int]:
        """Table of a row and its place there."""
        if name == "text":
            return name, row
        number = bisect_right(self._starts, row) - 1
        place = row if name == "target" or self._paired is None else _place_in(self._paired, row)
        return f"{name}-{self._spans[number].table}", place + self._shifts[name][number]

    def _shard(self, table: str, number: int) -> dict[str, Tensor]:
        name = shard_name(table, number)
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        # Memory-mapped: a row is read from the disk when it is used.
        with safe_open(self.folder / name, framework="pt") as file:
            self._open[name] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[name]


def _read_index(folder: Path) -> dict[str, Any]:
    """The index, with every value in its form.

    Raises:
        InputError: it is missing or damaged.
    """
    path = folder / INDEX
    with understood(path, AGAIN):
        index = {
            "key": {},
            "spans": {},
            "paired": None,
            **{key: value for key, value in read_object(path).items() if value is not None},
        }
        dict(index["key"])
        _require_counts(index["count"], index["rows_per_shard"])
        held = index["held_out"]
        for name, rows in (("held_out", held), ("paired", index["paired"])):
            if rows is None:
                continue
            known = all(type(row) is int and 0 <= row < index["count"] for row in rows)
            if not known or rows != sorted(set(rows)) or not 0 < len(rows) < index["count"]:
                raise ValueError(f"{name} is no list of rows")
        for spans in dict(index["spans"]).values():
            ends = [0, *(Span(*span).stop for span in spans)]
            if [Span(*span).start for span in spans] != ends[:-1] or ends[-1] != index["count"]:
                raise ValueError("the spans do not follow one another")
        for name, tensors in dict(index["tables"]).items():
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no name of a table")
            for shape in dict(tensors).values():
                _require_counts(*shape)
            if name.startswith(("target-", "base-")):
                _ = tensors["z"]
    return index


def _require_counts(*numbers: Any) -> None:
    if not all(type(number) is int and 0 < number < 1 << 40 for number in numbers):
        raise ValueError(f"{numbers} are no numbers of rows, or no shape")


def hold_out(names: Sequence[str], before: Sequence[int] = (), rows: int = 0) -> list[int]:
    """The rows that no training sees: a twentieth, 1 to 512 rows, those whose names have the smallest hashes.

    So they come from everywhere in the data. When rows are appended, those of ``before`` stay held out.

    Args:
        names: one per row.
        before: what was held out of the first ``rows``; the others of them were trained on, and stay so.
    """
    wanted = held_out_rows(len(names))
    order = from_everywhere(range(rows, len(names)), names)
    return sorted([*before, *order[: max(0, wanted - len(before))]])


class _Others(Sequence[int]):
    """The numbers below ``count`` without ``left_out`` (ascending). It takes no memory per number."""

    def __init__(self, count: int, left_out: Sequence[int]) -> None:
        self._count = count - len(left_out)
        self._before = [
            number - place for place, number in enumerate(left_out)
        ]  # how many are smaller, and not left out

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self._count:
            raise IndexError(place)
        return place + bisect_right(self._before, place)


def within(rows: range, view: Sequence[int]) -> range:
    """Positions in ``view`` (ascending) of those ``rows`` that the view shows."""
    return range(bisect_left(view, rows.start), bisect_left(view, rows.stop))


def _place_in(rows: Sequence[int], row: int) -> int:
    """Place of a row in ``rows`` (ascending); ValueError when it is none of them."""
    place = bisect_left(rows, row)
    if place == len(rows) or rows[place] != row:
        raise ValueError(f"row {row} has no latents of the base")
    return place


def _shifts(spans: Sequence[Span], parts: Sequence[range]) -> list[int]:
    """For each span what makes of a number in its part the place in its table.

    Args:
        parts: numbers of the rows of each span that the tables hold.
    """
    held: dict[str, int] = {}
    shifts = []
    for span, part in zip(spans, parts, strict=True):
        shifts.append(held.get(span.table, 0) - part.start)
        held[span.table] = held.get(span.table, 0) + len(part)
    return shifts


class Captions:
    """The captions of a cache, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        with safe_open(Path(folder) / CAPTIONS, framework="pt") as file:
            self._text, self._ends = file.get_tensor("text"), file.get_tensor("ends")

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, rows: Iterable[int]) -> list[str]:
        """Captions of ``rows``."""
        spans = ((int(self._ends[row - 1]) if row else 0, int(self._ends[row])) for row in rows)
        return [self._text[start:end].numpy().tobytes().decode() for start, end in spans]


def write_captions(folder: Path, captions: Iterable[str]) -> None:
    """Write the captions of all rows, in order."""
    parts = [caption.encode() for caption in captions]
    text = torch.frombuffer(bytearray(b"".join(parts)) or bytearray(1), dtype=torch.uint8)
    ends = torch.tensor(list(itertools.accumulate(map(len, parts))), dtype=torch.int64)
    atomic_save({"text": text, "ends": ends}, folder / CAPTIONS)


def _require_key(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> None:
    if wanted is None:
        return
    different = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if different:
        shown = ", ".join(
            f"{name} ({str(found.get(name))[:24]}, wanted {str(wanted.get(name))[:24]})" for name in different
        )
        raise InputError(
            f"the latents in {folder} were made from something else: {shown}", "make them again with --from latents"
        )


def shard_name(table: str, number: int) -> str:
    """File name of shard ``number`` of a table."""
    return f"{table}-{number:05d}.safetensors"


def shard_before(folder: Path, table: str, number: int) -> dict[str, Tensor]:
    """The rows that a shard holds already; {} without a shard."""
    path = folder / shard_name(table, number)
    return load_file(path) if path.exists() else {}


def rows_of(shard: Mapping[str, Tensor]) -> int:
    return len(next(iter(shard.values()))) if shard else 0


def write_shard(folder: Path, table: str, number: int, tensors: dict[str, Tensor]) -> None:
    atomic_save(tensors, folder / shard_name(table, number))


def write_index(
    folder: Path,
    count: int,
    rows_per_shard: int,
    held_out: Sequence[int],
    key: Mapping[str, Any] | None = None,
    spans: Mapping[int, list[Span]] | None = None,
    paired: Sequence[int] | None = None,
) -> None:
    """Write the index, from the first shard of every table. Call it last: a cache without an index is unfinished.

    Args:
        held_out: rows that no training sees (`hold_out`).
        key: what the rows were made from, by name.
        spans: the spans of rows at every px, for a cache with buckets.
        paired: the rows that have latents of the base, ascending; None: all of them, or none.
    """
    tables = {}
    for path in sorted(folder.glob("*-00000.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tables[path.name.removesuffix("-00000.safetensors")] = {
                key: file.get_slice(key).get_shape()[1:] for key in names
            }
    index = {
        "key": key,
        "count": count,
        "rows_per_shard": rows_per_shard,
        "held_out": list(held_out),
        "tables": tables,
    }
    some = {"paired": list(paired)} if paired is not None else {}
    write_json(folder / INDEX, {**index, **some, **({"spans": spans} if spans else {})})
