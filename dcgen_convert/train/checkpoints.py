"""Portable checkpoints of the trained state: safetensors + JSON, independent of ZeRO stage and number of ranks.

    <folder>/step-000500/
        state-00001.safetensors ...   "param/<name>", "exp_avg/<name>", "exp_avg_sq/<name>", "ema/<name>", all full fp32
        checkpoint.json               step, files with sizes and SHA-256, shapes, and what the caller adds ("extra")

Rank 0 gathers and writes. When every weight trains on several ranks, nothing is gathered: each rank writes what it
holds, as files state-r003-00001.safetensors of flat parts "<key>/<name>@<offset>". Such a checkpoint can be read by any
number of ranks too: the offsets put the parts of a tensor in order, however many ranks wrote them.

A checkpoint is written under a temporary name, flushed, then renamed. So a folder called step-... is whole. The newest
whole one is loaded, and two are kept. Nothing about random numbers is stored: the draws of a step depend on (seed,
step, sample) alone (see `objective.draw`).
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from dcgen_convert.core import pulse
from dcgen_convert.core.errors import CheckFailed, InputError, ResourceError
from dcgen_convert.core.files import TEMPORARY, atomic_save, fsync, read_object, sha256, understood, write_json
from dcgen_convert.train import distributed
from dcgen_convert.train.state import WEIGHT, true_shape

if TYPE_CHECKING:
    from torch import Tensor

    from dcgen_convert.train.engine import Engine

SCHEMA = "dcgen.checkpoint/2"
INDEX = "checkpoint.json"
KEPT = 2
SHARD_BYTES = 2 << 30  # what rank 0 holds at once while it gathers


def save(engine: Engine, folder: str | Path, extra: dict[str, Any]) -> Path:
    """Write `step-%06d` under ``folder`` and delete all but the last two. Collective: every rank calls it.

    When a write fails, every rank raises and the older checkpoints stay.

    Raises:
        ResourceError: a rank could not write (disk full, no permission).
    """
    folder, speaks = Path(folder), engine.rank == 0
    final = step_folder(folder, engine.step_count)
    tag = distributed.of_rank_0(secrets.randbits(31), engine.device)
    temporary = folder / f"{TEMPORARY}{tag:08x}-{final.name}"
    writes = speaks or engine.sharded
    writer = _Writer(temporary, f"r{engine.rank:03d}-" if engine.sharded else "") if writes else None
    files = _write_tensors(engine, writer)
    if speaks and writer:
        document = {"schema": SCHEMA, "step": engine.step_count, "ema": engine.settings.ema > 0, "extra": extra}
        writer.finish({**document, "files": files, "shapes": _shapes(engine)}, final)
    error = writer.error if writer else None
    if not distributed.agree(error is None, engine.device):
        if speaks:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror or error if error else "rank 0 failed"
        raise ResourceError(
            f"the checkpoint of step {engine.step_count} could not be written to {folder}: {reason}",
            hint="free disk space, then resume: the previous checkpoint is whole",
        ) from error
    if speaks:
        prune(folder)
    return final


def _write_tensors(engine: Engine, writer: _Writer | None) -> dict[str, list[Any]]:
    """Write what this rank has to write (nothing without a writer); name -> [size, hash] of the files of all ranks.

    When a rank failed, every writer holds an error afterwards: only if all files of all ranks are on the disk, the
    folder may get the name that says "whole".
    """
    for key in engine.state.keys:
        for name, tensor in engine.pieces(key) if engine.sharded else engine.tensors(key):
            if writer:
                writer.add(f"{key}/{name}", tensor)
    files = writer.flush() if writer else {}
    if not engine.sharded or writer is None:
        return files
    found = distributed.of_all([files, str(writer.error) if writer.error else None], engine.device)
    failed = next((f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error), None)
    if failed and writer.error is None:
        writer.error = OSError(None, failed)
    return {name: known for part, _ in found for name, known in part.items()}


def _shapes(engine: Engine) -> dict[str, list[int]]:
    """Shape of every tensor of a checkpoint of ``engine``."""
    return {f"{key}/{name}": list(true_shape(p)) for key in engine.state.keys for name, p in engine.named.items()}


class _Writer:
    """Collects tensors into shards.

    After a failed write it only remembers the error: the other ranks are still gathering.
    """

    def __init__(self, folder: Path, label: str = "") -> None:
        self.folder, self.label = folder, label
        self.error: OSError | None = None
        self._files: dict[str, list[Any]] = {}
        self._shard: dict[str, Tensor] = {}
        self._bytes = 0
        self._guarded(folder.mkdir, parents=True, exist_ok=True)

    def add(self, key: str, tensor: Tensor) -> None:
        self._shard[key] = tensor
        self._bytes += tensor.nbytes
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def finish(self, document: dict[str, Any], final: Path) -> None:
        """Write the index, then give the folder its final name."""
        self._guarded(write_json, self.folder / INDEX, document)
        self._guarded(fsync, self.folder)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            self._guarded(os.replace, final, final.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{final.name}"))
        self._guarded(os.replace, self.folder, final)
        self._guarded(fsync, final.parent)

    def flush(self) -> dict[str, list[Any]]:
        """Write what is left; name -> [size, hash] of all files so far."""
        if self._shard:
            path = self.folder / f"state-{self.label}{len(self._files) + 1:05d}.safetensors"
            self._guarded(atomic_save, self._shard, path, {"format": "pt"})  # the index has the hash
            self._files[path.name] = [path.stat().st_size, sha256(path)] if path.exists() else [0, ""]
            self._shard, self._bytes = {}, 0
        return self._files

    def _guarded(self, action: Callable[..., object], *args: object, **kwargs: object) -> None:
        if self.error is not None:
            return
        try:
            action(*args, **kwargs)
        except OSError as error:
            self.error = error


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def whole(folder: str | Path) -> list[Path]:
    """Whole checkpoints under ``folder``, oldest first."""
    return sorted(path for path in Path(folder).glob("step-*") if _is_whole(path))


def _is_whole(path: Path) -> bool:
    try:
        document = _document(path)
        return all((path / name).stat().st_size == size for name, (size, _) in document["files"].items())
    except (InputError, OSError):
        return False


def _document(path: Path) -> dict[str, Any]:
    """The index of the checkpoint in ``path``; InputError when it is damaged."""
    with understood(path / INDEX, f"delete {path}: the checkpoint before it is used then"):
        document = read_object(path / INDEX)
        for key, kind in (("step", int), ("files", dict), ("shapes", dict), ("extra", dict)):
            if type(document[key]) is not kind:
                raise ValueError(f"{key} is {document[key]!r}"[:80])
        if any(type(size) is not int or type(digest) is not str for size, digest in document["files"].values()):
            raise ValueError("a file is without size or hash")
        outside = [name for name in document["files"] if Path(name).name != name]
        if outside or any(math.prod(shape) < 0 for shape in document["shapes"].values()):
            raise ValueError(f"{outside[0]} is no file of the folder" if outside else "a shape is negative")
        return document


def prune(folder: Path) -> None:
    """Delete all but the last ``KEPT`` checkpoints, and whatever unfinished save a kill left behind."""
    for path in whole(folder)[:-KEPT]:
        # Rename before deleting: a half-deleted one must not look whole.
        os.replace(path, path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}"))
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def latest(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """(path, index document) of the newest whole checkpoint, or None."""
    found = whole(folder)
    return (found[-1], _document(found[-1])) if found else None


def damaged(folder: str | Path) -> Path | None:
    """The newest checkpoint, if it is not whole any more: a file is missing or cut short, or its index is damaged."""
    newest = max(Path(folder).glob("step-*"), default=None)
    return newest if newest and not _is_whole(newest) else None


def _damaged(path: Path, what: str) -> CheckFailed:
    """What to do about the checkpoint in ``path``: nobody goes back to an older one without a word."""
    return CheckFailed(what, hint=f"delete {path}: the checkpoint before it is used then")


def load(engine: Engine, folder: str | Path) -> dict[str, Any] | None:
    """Put the newest whole checkpoint into ``engine``; its ``extra``, or None when there is none. Collective.

    Raises:
        InputError: the checkpoint is of another set of trained tensors.
        CheckFailed: a value in it is missing or not finite.
    """
    found = latest(folder)
    # Rank 0's choice: on a network file system the ranks may see the folder at different times.
    step = distributed.of_rank_0(found[1]["step"] if found else -1, engine.device)
    if step < 0:
        return None
    path = step_folder(Path(folder), step)
    document = _document(path)
    wanted = _shapes(engine)
    if document.get("schema") != SCHEMA or document["shapes"] != wanted:
        different = next(
            (key for key in {**wanted, **document["shapes"]} if wanted.get(key) != document["shapes"].get(key)),
            "its schema",
        )
        raise InputError(
            f"{path} was written by a run that trains other tensors ({different} differs)",
            hint=f"delete {Path(folder)} to start this stage again",
        )
    for file, (_, digest) in document["files"].items():
        pulse.bump()
        if sha256(path / file) != digest:
            raise _damaged(path, f"{path / file} is damaged: it is not what the training wrote")
    for key, name, value in _tensors(path, document):
        pulse.bump()
        if key == WEIGHT and not value.isfinite().all():
            raise _damaged(path, f"{path}: {name} holds values that are not finite")
        engine.state.write(engine.named[name], key, value)
    engine.state.set_step(document["step"])
    engine.step_count = document["step"]
    return document["extra"]


def _tensors(path: Path, document: dict[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
    """(key, parameter name, full tensor) of everything in a checkpoint, one at a time, in the same order on every rank.

    Raises:
        CheckFailed: parts of a tensor are missing.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path / name, framework="pt")) for name in document["files"]]
        places: dict[str, list[tuple[int, Any, str]]] = {}
        for file in files:  # memory-mapped: what is opened is not read
            for stored in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                full_name, _, offset = stored.partition("@")
                places.setdefault(full_name, []).append((int(offset or 0), file, stored))
        for full_name, shape in document["shapes"].items():
            parts = sorted(places.get(full_name, ()), key=lambda place: place[0])
            value = (
                torch.cat([file.get_tensor(stored).flatten() for _, file, stored in parts]) if parts else torch.empty(0)
            )
            if value.numel() != math.prod(shape):
                raise _damaged(path, f"{path}: {full_name} has {value.numel()} of {math.prod(shape)} numbers")
            key, name = full_name.split("/", 1)
            yield key, name, value.view(shape)
