"""Runs mutations of one target in this process: each ends soon, with a known error or none, and without a leak."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dcgen_convert.core.errors import InternalError, explain

from .targets import Target

SECONDS = 60  # that one input may take
GROWTH = 1 << 30  # bytes that the process may grow by, over all inputs of a target


class Hang(BaseException):
    """An input took longer than ``SECONDS``. No `Exception`, so that no handler takes it for a damaged file."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `Hang` when the body takes longer."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(target: Target, count: int, seed: int, place: Path) -> list[str]:
    """What went wrong in ``count`` mutations of ``target``: one text for each fault, with the seed that shows it."""
    good = place / "good"
    good.mkdir(parents=True)
    target.make(good)
    with limited(10 * SECONDS):  # the first one also imports the large packages
        target.use(copied(target, good, place / "bad"))  # the good input is taken, or the mutations show nothing
    before, faults = largest(), []
    for number in range(seed, seed + count):
        bad = copied(target, good, place / "bad")
        target.spoil(random.Random(f"{target.name} {number}"), bad)
        if fault := fault_of(target, bad):
            faults.append(f"{target.name}, seed {number}: {fault}")
    if largest() - before > GROWTH:
        faults.append(f"{target.name}: the process has grown by {(largest() - before) / 1e9:.1f} GB")
    return faults


def copied(target: Target, good: Path, bad: Path) -> Path:
    """A fresh copy of the good input. Weights are links: what damages a file replaces it."""
    shutil.rmtree(bad, ignore_errors=True)
    if target.name in LINKED:
        shutil.copytree(good, bad, copy_function=lambda origin, copy: Path(copy).hardlink_to(origin))
    else:
        shutil.copytree(good, bad)
    return bad


LINKED = ("headers", "gguf", "lora", "--ae config", "manifest", "config", "index")


def fault_of(target: Target, folder: Path) -> str | None:
    """Use the input; None when it is taken, or refused with a sentence."""
    try:
        with limited(SECONDS):
            target.use(folder)
    except Hang:
        return f"no end after {SECONDS} s"
    except Exception as exc:  # noqa: BLE001  all of them are looked at
        error = explain(exc)
        if isinstance(error, InternalError):
            place = traceback.extract_tb(exc.__traceback__)[-1]
            return f"{error.message} at {place.filename}:{place.lineno}"
        if not error.message:
            return f"no sentence for {exc!r}"
    return None


def largest() -> int:
    """Bytes of the largest size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
