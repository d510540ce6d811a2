"""The rows of the latents: which picture is which row, at which sizes it is seen, and which rows are paired.

rows.jsonl lists the pictures in the order of the rows. New pictures are appended: the rows that are there keep their
places, stay held out or not, and paired or not. A picture whose row is not paired has the mark PAIRED false; in a run
of an earlier version all rows are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from dcgen_convert.core.files import read_json
from dcgen_convert.core.journal import Stage
from dcgen_convert.data import buckets, cache, contents, images
from dcgen_convert.data.buckets import Span
from dcgen_convert.data.images import Picture
from dcgen_convert.data.paired import paired_rows
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.recipe import paired as rule
from dcgen_convert.stages import precision
from dcgen_convert.stages.job import Job

HELD_OUT = "held-out.json"  # rows that no training sees
PAIRED = "paired"  # whether a row has latents of the base too


def say(job: Job, text: str) -> None:
    job.console.say(f"{job.folders.latents.name}: {text}")


def rows_before(job: Job) -> list[Picture]:
    """The pictures that have rows already, in their order."""
    path = job.folders.latents / images.ROWS
    return images.read_index(path, job.pictures_root) if path.exists() else []


def held_before(stage: Stage, rows: int) -> list[int]:
    """The held-out rows of the first ``rows``."""
    path = stage.folder / HELD_OUT
    return [row for row in read_json(path) if row < rows] if path.exists() else []


def row_name(job: Job, picture: Picture) -> str:
    """A name that is the same wherever data and run lie."""
    return os.path.relpath(picture.file, job.pictures_root)


def arranged(job: Job, pictures: list[Picture]) -> list[Picture]:
    """The pictures in the order of the cache's rows: by number of references, then by shape where there are buckets."""
    if job.recipe.data.buckets:
        pictures = [pictures[i] for i in buckets.by_shape([shape_of(job, picture) for picture in pictures])]
    return sorted(pictures, key=lambda picture: len(job.references_of(picture)))


def spans_of(job: Job, stage: Stage, pictures: list[Picture], resolutions: list[int]) -> dict[int, list[Span]]:
    """For each resolution the spans of rows of one size and one number of references."""
    more = [len(job.references_of(picture)) - job.family.fewest_references for picture in pictures]
    if not job.recipe.data.buckets:
        squares = [(1, 1)] * len(pictures)
        return {px: buckets.spans(squares, [], px, more) for px in resolutions}
    shapes = [shape_of(job, picture) for picture in pictures]
    spans = {px: buckets.spans(shapes, job.buckets[px], px, more) for px in resolutions}
    for px in resolutions:
        filled = buckets.tables(spans[px]).values()
        shown = ", ".join(
            f"{parts[0].height}x{parts[0].width} {sum(len(part.rows) for part in parts)}" for parts in filled
        )
        stage.metrics[f"buckets_{px}"] = shown
        say(job, f"{px} px, pictures by height x width: {shown}")
    return spans


def paired_before(job: Job) -> list[int]:
    """The rows that have latents of the base, of the pictures that have rows."""
    path = job.folders.latents / images.ROWS
    marks = images.read_mark(path, PAIRED, True) if path.exists() else []
    return [row for row, mark in enumerate(marks) if mark]


def paired_of(
    job: Job, pictures: list[Picture], held_out: list[int], spans: list[Span], before: list[int], rows: int
) -> list[int]:
    """The rows of ``pictures`` that have latents of the base: as many as the alignment of the embedder can use.

    Args:
        spans: at the resolution of the first phase.
        before: what is paired of the first ``rows``.
    """
    sizes, count = shapes_of(job.recipe, job.identity), len(pictures)
    names = [row_name(job, picture) for picture in pictures]
    paired = paired_rows(names, held_out, spans, rule.enough(*sizes.alignment_rows), before, rows)
    if len(paired) < count:
        say(job, rule.told(len(paired), count, job.family.axes == 3, *sizes.alignment_rows))
    return paired


def write_rows(job: Job, pictures: list[Picture], paired: list[int]) -> None:
    """Write rows.jsonl."""
    others = {*range(len(pictures))}.difference(paired) if job.is_aligned else ()
    marks = {row: {PAIRED: False} for row in others}
    images.write_index(job.folders.latents / images.ROWS, pictures, job.pictures_root, marks)


def tables_of(job: Job, spans: list[Span], paired: list[int]) -> list[tuple[str, Span, list[Sequence[int]]]]:
    """(autoencoder, a span that has the size of all, rows of each span) of every table at one resolution."""
    found: list[tuple[str, Span, list[Sequence[int]]]] = []
    for name in ("target", "base"):
        for parts in buckets.tables(spans).values():
            if name in sizes_of(job, parts[0]):
                rows: list[Sequence[int]] = [part.rows if name == "target" else within(paired, part) for part in parts]
                found.append((name, parts[0], rows))
    return found


def within(rows: list[int], span: Span) -> list[int]:
    """Those of ``rows`` (ascending) that are in a span."""
    part = cache.within(span.rows, rows)
    return rows[part.start : part.stop]


def sizes_of(job: Job, span: Span) -> dict[str, contents.Size]:
    """(height, width) in px of the pictures of a span, of videos (frames, height, width); by autoencoder.

    The base sees them in the first phase only, at the size of the alignment: no later stage reads its latents.
    """
    sizes: dict[str, contents.Size] = {"target": (span.height, span.width)}
    if job.is_aligned and span.table.partition("-")[0] == str(job.alignment.resolution):
        sizes["base"] = job.alignment.size(span.height, span.width)
    if job.frames:
        frames = {"target": job.frames, "base": job.shown_frames}
        sizes = {name: (frames[name], *size) for name, size in sizes.items()}
    return sizes


def first_views(job: Job, spans: dict[int, list[Span]]) -> dict[str, tuple[contents.Size, list[int]]]:
    """What each autoencoder is tried on: the first pictures, at the largest size that it sees."""
    shown = {"base": spans[job.alignment.resolution][0], "target": spans[max(spans)][0]}
    most = precision.PICTURES
    return {name: (sizes_of(job, span)[name], list(span.rows[:most])) for name, span in shown.items()}


def shape_of(job: Job, picture: Picture) -> tuple[int, int]:
    """(width, height) in px of a picture or a video as it is shown."""
    return contents.size_of(picture.file, moving=bool(job.frames))
