"""A run that was stopped at 5 points goes on with 12 changes: is any work done again that need not be?

    python tests/benchmarks/continuations.py [a word of the changes to try, all]

One tiny run is stopped inside data, after latents, inside align-head, inside adapt-1 and inside quantize. Each of these
60 copies gets one change and goes on to the end of the stage that was stopped. All that costs time is counted while it
is done: pictures drawn, pictures and captions encoded, training steps, calibration pictures, blocks, and stages that
write their outputs again. What is more than the change asks for is lost. The seconds are the share of the stage's own.
A line per continuation shows what was done (a stage's name: it ran again), why more than the rest of the run, and what
was lost. The row "nothing" goes on without a change.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import SHORT, WEIGHTS

from dcgen_convert import conversion
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.errors import DcgenError, Terminated
from dcgen_convert.core.journal import Run
from dcgen_convert.networks import pipelines
from dcgen_convert.networks.autoencoders import Codec
from dcgen_convert.recipe.loading import load
from dcgen_convert.stages import records

COUNT, MORE, STEPS, LONGER, STOP = 24, 31, 12, 18, 5
BASE = {
    **SHORT, "data.count": COUNT, "data.batch": 8, "latents.batch": 8, "latents.scale_tolerance": 100,
    "align_head.steps": STEPS, "align_head.warmup": 2, "align_head.batch": 8, "adapt.phases.0.steps": STEPS,
    "adapt.phases.0.warmup": 2, "adapt.phases.0.batch": 8, "quantize.format": "nvfp4", "evaluate.prompts": 0,
    "quantize.calibration.prompts": 3, "quantize.calibration.steps": 1, "quantize.calibration.batch": 2,
}  # fmt: skip
# Point -> the stage that the run is stopped in, and that the continuation ends with.
POINTS = {
    "inside data": ("data", "data"),
    "after latents": ("latents", "align-embedder"),
    "inside align-head": ("align-head", "align-head"),
    "inside adapt-1": ("adapt-1", "adapt-1"),
    "inside quantize": ("quantize", "quantize"),
}
SYNTHESIS, ROWS, CAPTIONS, LEAST_SQUARES = "synthesis", "rows", "captions", "least squares for the head"
HEAD, ADAPT, CALIBRATION, BLOCKS = "align head", "adapt", "calibration", "blocks"
# Kind of work -> its stage, and how much of it one undisturbed run does.
WORK = {
    SYNTHESIS: ("data", COUNT),
    ROWS: ("latents", 2 * COUNT),  # two autoencoders
    CAPTIONS: ("latents", COUNT),
    LEAST_SQUARES: ("align-head", COUNT - 1 + 5),  # one row is held out, and decides at five noise levels
    HEAD: ("align-head", STEPS),
    ADAPT: ("adapt-1", STEPS),
    CALIBRATION: ("quantize", 3),
    BLOCKS: ("quantize", 6),
}
STAGES = ("surgery", "data", "latents", "align-embedder", "align-head", "adapt-1", "merge-1", "quantize")
WHOLE = ("surgery", "align-embedder", "merge-1")  # stages that make all of their outputs or none


class Watching(Console):
    """Counts work by kind, and stops the run when a kind has reached a number."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        super().__init__("human", stderr=open(os.devnull, "w"))  # noqa: SIM115  closed with the process
        self.done: Counter[str] = Counter()
        self.stop, self.label = stop, ""

    def begin(self, kind: str) -> None:
        """Stop before the next piece of work, if this kind has reached its number."""
        if self.stop and kind == self.stop[0] and self.done[kind] >= self.stop[1]:
            raise Terminated

    @contextmanager
    def progress(self, label: str, total: int | None, unit: str = "") -> Iterator[Any]:
        before, self.label = self.label, label.split(" by ")[0]
        with super().progress(label, total, unit) as bar:
            if label == LEAST_SQUARES:
                advance = bar.advance
                bar.advance = lambda number, **shown: (self.done.update({label: number}), advance(number, **shown))
            yield bar
        self.label = before

    def scalars(self, label: str, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.done[label.split(" (")[0]] += 1
            if self.stop == (label.split(" (")[0], self.done[label.split(" (")[0]] + 1):
                os.kill(os.getpid(), 15)  # a training ends the step in work, and writes a checkpoint


@contextmanager
def counted(console: Watching) -> Iterator[None]:
    """Count what is drawn, encoded and quantised, where it is done."""
    from dcgen_convert.svdquant import quantize as blocks

    pieces: dict[tuple[Any, str], Callable[[Any], tuple[str, int]]] = {
        (pipelines, "draw"): lambda given: (console.label, len(given[2])),
        (pipelines, "encode_text"): lambda given: (CAPTIONS, len(given[2]) * (console.label == "text embeddings")),
        (Codec, "encode"): lambda given: (ROWS, len(given[1]) * (console.label == "latents")),
        (blocks, "_finish_block"): lambda given: (BLOCKS, 1),
    }
    kept = {(place, name): getattr(place, name) for place, name in pieces}

    def counting(place: Any, name: str) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            kind, number = pieces[place, name](given)
            console.begin(kind)
            result = kept[place, name](*given, **more)
            console.done[kind] += number
            return result

        return call

    for place, name in pieces:
        setattr(place, name, counting(place, name))
    try:
        yield
    finally:
        for (place, name), function in kept.items():
            setattr(place, name, function)


def go(home: Path, until: str, settings: Mapping[str, object], stop: tuple[str, int] | None = None) -> Counter[str]:
    """Run, or go on with, the conversion in ``home``; what was done."""
    console = Watching(stop)
    sets = [f"{key}={value}" for key, value in {**BASE, "data.prompts": home / "prompts.txt", **settings}.items()]
    resolved = load(str(home / "source"), recipe="tiny-flux", sets=[*sets, f"ae={home / 'autoencoder'}"])
    try:
        with counted(console):
            conversion.convert(resolved, home / "run", home / "out", console, until=until)
        stopped = False
    except Terminated:
        stopped = True
    assert stopped == bool(stop), f"{until}: stopped {stopped}"
    return console.done


def make(root: Path) -> dict[str, tuple[Path, Counter[str]]]:
    """The run as it was stopped at each point: point, or point and " cosine" -> its folder, and what was done."""
    home = root / "first"
    shutil.copytree(WEIGHTS / "tiny-flux", home / "source")
    shutil.copytree(WEIGHTS / "tiny-dc-ae-f32", home / "autoencoder")
    (home / "prompts.txt").write_text("".join(f"a small red circle, number {number}\n" for number in range(99)))
    stops: dict[str, tuple[str, int] | None] = {
        "inside data": (SYNTHESIS, 16),
        "after latents": None,
        "inside align-head": (HEAD, STOP),
        "inside adapt-1": (ADAPT, STOP),
        "inside quantize": (BLOCKS, 1),
    }
    found: dict[str, tuple[Path, Counter[str]]] = {}
    done: Counter[str] = Counter()
    for kind, settings in (("", {}), (" cosine", {"adapt.phases.0.schedule": "cosine"})):
        if kind:
            home, done = copy(found["inside align-head"][0], root / "cosine"), found["inside align-head"][1]
        for point, (stage, _) in POINTS.items():
            if kind and point not in ("inside adapt-1", "inside quantize"):
                found[point + kind] = found[point]
                continue
            done = done + go(home, stage, settings, stops[point])
            found[point + kind] = copy(home, root / f"{point}{kind}".replace(" ", "-")), done
    return found


def copy(home: Path, to: Path) -> Path:
    return Path(shutil.copytree(home, to, symlinks=True))


def touched(home: Path) -> None:
    for path in home.rglob("*"):
        os.utime(path)


def noted(home: Path) -> None:
    for folder in (home, home / "source", home / "autoencoder", home / "run" / "data"):
        (folder / "NOTES.md").write_text("where this comes from")


def moved(home: Path) -> Path:
    """The folders of run, source, autoencoder and prompts in another place."""
    return home.rename(home.with_name(f"{home.name} moved"))


def newer(home: Path) -> None:
    records.__version__ = "0.9.0"


Change = Callable[[Path], Path | None]
# Name -> what is set or done; what is set by the stage that was stopped where that makes a difference.
CHANGES: dict[str, dict[str, object] | Change] = {
    "nothing": {},
    "more pictures": {"data.count": MORE},
    "longer, constant": {"adapt.phases.0.steps": LONGER, "align_head.steps": LONGER},
    "longer, cosine": {"adapt.phases.0.schedule": "cosine", "adapt.phases.0.steps": LONGER},
    "lower lr": {"adapt.phases.0.lr": 1e-5, "align_head.lr": 1e-5},
    "lower clip": {"adapt.clip": 0.01, "align_head.clip": 0.01},
    "batches": {"data.batch": 5, "latents.batch": 3, "quantize.calibration.batch": 1},
    "memory": {"adapt.phases.0.micro_batch": 2, "adapt.zero": 1, "adapt.checkpointing": True},
    "tolerances": {"latents.scale_tolerance": 90, "data.max_broken": 0.5, "watch.evaluate_every": 50,
                   "evaluate.prompts": 2},
    "touched": touched,
    "notes": noted,
    "moved": moved,
    "newer version": newer,
}  # fmt: skip


def settings_of(change: dict[str, object], point: str) -> dict[str, object]:
    """Settings of the head's training change only while it is the one that was stopped."""
    return {key: value for key, value in change.items() if not key.startswith("align_head") or "head" in point}


def asked(name: str, point: str) -> tuple[dict[str, int], set[str], str]:
    """What a change asks for: more work by kind, stages whose results are void, and why in words."""
    if name == "more pictures":
        more = MORE - COUNT
        work = {SYNTHESIS: more} if point == "inside data" else {SYNTHESIS: more, ROWS: 2 * more, CAPTIONS: more}
        return work, set(), f"{more} more pictures"
    trained = {"inside align-head": HEAD, "inside adapt-1": ADAPT, "inside quantize": ADAPT}.get(point)
    last = point == "inside quantize"
    if name.startswith("longer") and trained and (trained == ADAPT or "constant" in name):
        void = {"merge-1", "quantize"} if last else set()
        return {trained: LONGER - STEPS}, void, f"{LONGER - STEPS} more steps{' give other weights' if last else ''}"
    if name.startswith("lower") and last:
        return {}, {"adapt-1", "merge-1", "quantize"}, "the phase was finished without it"
    return {}, set(), ""


def state(run: Path) -> dict[str, tuple[float, list[tuple[int, int]]]]:
    """Stage -> its seconds, and what stands for the bytes of its marker, if it is finished."""
    found = {}
    for folder in sorted(path for path in run.iterdir() if path.is_dir()):
        marker = folder / "stage.json"
        at = [(marker.stat().st_ino, marker.stat().st_mtime_ns)] if marker.exists() else []
        found[folder.name] = (Run(run, NULL).spent(folder.name), at)
    return found


def work_lost(name: str, point: str, made: Counter[str], done: Counter[str]) -> dict[str, int]:
    """Kind -> how much more of it was done than the rest of the run and the change ask for."""
    more, void, _ = asked(name, point)
    reached = STAGES[: STAGES.index(POINTS[point][1]) + 1]
    lost = {}
    for kind, (stage, total) in WORK.items():
        wanted = max(0, total - made[kind]) + more.get(kind, 0) if stage in reached else 0
        if done[kind] > wanted and stage not in void:
            lost[kind] = done[kind] - wanted
    return lost


def try_one(home: Path, made: Counter[str], name: str, point: str) -> tuple[str, float]:
    """Go on with one change; (cell of the table, seconds lost)."""
    change, version = CHANGES[name], records.__version__
    settings = settings_of(change, point) if isinstance(change, dict) else {}
    if callable(change):
        home = change(home) or home
    before = state(home / "run")
    try:
        done = go(home, POINTS[point][1], settings)
    finally:
        records.__version__ = version
    again = [
        stage for stage, (_, marker) in state(home / "run").items() if before.get(stage, (0, []))[1] not in ([], marker)
    ]
    lost = work_lost(name, point, made, done)
    lost |= {stage: 1 for stage in again if stage in WHOLE and stage not in asked(name, point)[1]}
    seconds = {stage: 0.0 for stage in STAGES}
    for kind, number in lost.items():
        stage, total = WORK.get(kind, (kind, 1))
        seconds[stage] = max(seconds[stage], before[stage][0] * number / total)
    shown = [f"{kind} {number}" for kind, number in done.items() if number] + again
    why = asked(name, point)[2]
    return f"{', '.join(shown) or '-'}{f' ({why})' if why else ''} | lost: {lost or '-'}", sum(seconds.values())


def main(words: list[str]) -> int:
    root, begun = Path(tempfile.mkdtemp()), time.process_time()
    made, found = make(root), {}
    for name in (name for name in CHANGES if not words or name in words):
        for point in POINTS:
            home, done = made[point + (" cosine" if "cosine" in name else "")]
            try:
                cell, seconds = try_one(copy(home, root / "try"), done, name, point)
            except DcgenError as error:
                cell, seconds = f"WRONG: {error.message}", float("nan")
            for folder in root.glob("try*"):
                shutil.rmtree(folder)
            found[name, point] = seconds
            print(f"{name:18}{point:20}{cell}", flush=True)
    print("\nseconds of work that were lost" + "".join(f"{point:>20}" for point in POINTS))
    for name in dict.fromkeys(name for name, _ in found):
        print(f"{name:30}" + "".join(f"{found[name, point]:20.2f}" for point in POINTS))
    wrong = sum(seconds != 0 for seconds in found.values())
    print(f"{len(found)} continuations, {wrong} of them lost work; {time.process_time() - begun:.0f} s of CPU")
    shutil.rmtree(root)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
