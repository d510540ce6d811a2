"""The figures of a benchmark: text, one denoising step, decoder and whole picture, of all models in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dcgen_convert.bundle.sample import check_size
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import is_out_of_memory
from dcgen_convert.evaluation.speed import BATCH, DECODE, ENCODE, IMAGE, PICTURE, SHARED, STEP, TEXT
from dcgen_convert.judging import recording
from dcgen_convert.judging.pair import BASE, Model, ModelPair
from dcgen_convert.judging.recording import DrawSettings, Recorded
from dcgen_convert.judging.timing import Stopwatch, Timing
from dcgen_convert.networks import at_once
from dcgen_convert.networks.pipelines import quiet_diffusers
from dcgen_convert.recipe import drawable
from dcgen_convert.stages import source_pipeline

MOST_TOGETHER = 64  # pictures of the largest batch
ROOM = 0.6  # of the memory of a GPU: weights up to so much stay there together, with room to work in
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A pair on a device."""

    pair: ModelPair
    watch: Stopwatch
    console: Console

    @property
    def device(self) -> torch.device:
        return self.watch.device

    @property
    def settings(self) -> DrawSettings:
        return DrawSettings(self.pair.steps, self.pair.guidance, self.pair.length, self.pair.frames)

    @property
    def together(self) -> bool:
        """Whether all weights may lie on the device at once."""
        if self.device.type != "cuda":
            return True
        total = torch.cuda.get_device_properties(self.device).total_memory
        return weights(part for model in self.pair.models.values() for part in _parts(model)) < ROOM * total

    def bring(self, wanted: Iterable[nn.Module]) -> None:
        """Move ``wanted`` to the device; what is not wanted leaves it first where not all fits."""
        wanted = list(wanted)
        if not self.together:
            for model in self.pair.models.values():
                for part in _parts(model):
                    if all(part is not one for one in wanted):
                        part.to("cpu")
            at_once.release()
        for part in wanted:
            part.to(self.device)

    def record(self, name: str, side: int, batch: int = 1) -> Recorded:
        """What the pipeline of model ``name`` asks of its parts for ``batch`` pictures."""
        model = self.pair.models[name]
        self.bring([*model.encoders, model.network, model.pipeline.vae])  # no further network computes
        with self._capped(name, side):
            return recording.record(model.pipeline, model.family, self.pair.size_of(side), batch, self.settings)

    @contextmanager
    def _capped(self, name: str, side: int) -> Iterator[None]:
        """Inside, the base has the largest timestep shift of its training at most."""
        pipeline = self.pair.models[name].pipeline
        before = pipeline.scheduler
        if name == BASE:
            source_pipeline.cap_shift(pipeline, self.pair.identity, side)
        try:
            yield
        finally:
            pipeline.scheduler = before

    def shared(self, drawing: Recorded) -> dict[str, Row]:
        """The figures of the encoders that all models share: of text, and of pictures where the pipeline has one."""
        encoders = self.pair.models[BASE].encoders
        image = [part for part in encoders if part is getattr(self.pair.models[BASE].pipeline, "image_encoder", None)]
        parts = {TEXT: [part for part in encoders if part not in image], IMAGE: image}
        work = {TEXT: drawing.encode_text, IMAGE: drawing.encode_image}
        found = {}
        for what in [what for what, calls in ((TEXT, drawing.text), (IMAGE, drawing.image)) if calls]:
            self.bring(parts[what])
            found[what] = _figure(self.watch.in_turn({BASE: work[what]})[BASE], 1, parts[what])
        return found

    def size(self, side: int, shared: dict[str, Row] | None) -> Row:
        """All rows at ``side`` px. shared: what another size has found of the encoders, which does not depend on it."""
        models = self.pair.models
        drawings = {name: self.record(name, side) for name in models}
        shared = self.shared(drawings[BASE]) if shared is None else shared
        rows = {what: dict.fromkeys(models, figure) for what, figure in shared.items()}
        autoencoders = [model.pipeline.vae for model in models.values()]
        if drawings[BASE].references:
            rows[ENCODE] = self._row(autoencoders, drawings, Recorded.encode_references, _autoencoder)
        rows[STEP] = self._row([model.network for model in models.values()], drawings, Recorded.one_step, _network)
        if self.device.type == "cuda":
            rows[BATCH] = self._largest(side, rows[STEP])
        rows[DECODE] = self._row(autoencoders, drawings, lambda one: one.decode(), _autoencoder)
        rows[PICTURE] = self._pictures(side, drawings, rows)
        height, width = self.pair.size_of(side)
        shape = {"height": height, "width": width, "frames": self.pair.frames}
        return {
            "resolution": side,
            **(shape if self.pair.family.axes == 3 else {}),
            "tokens": self._tokens(side),
            "passes": {name: drawing.passes for name, drawing in drawings.items()},
            "rows": rows,
            "ratios": {what: _ratios(row) for what, row in rows.items() if what not in SHARED},
            "pictures_per_minute": {name: self._per_minute(name, drawings[name], rows) for name in models},
        }

    def _row(
        self,
        parts: list[nn.Module],
        drawings: Mapping[str, Recorded],
        work: Callable[[Recorded], object],
        part: Callable[[Model], nn.Module],
    ) -> Row:
        self.bring(parts)
        timings = self.watch.in_turn({name: partial(work, drawing) for name, drawing in drawings.items()})
        return {
            name: _figure(timings[name], drawing.batch, [part(self.pair.models[name])])
            for name, drawing in drawings.items()
        }

    def _largest(self, side: int, steps: Row) -> Row:
        """The row of one step with as many pictures as fit the GPU together."""
        drawings = {}
        for name, model in self.pair.models.items():
            self.bring([one.network for one in self.pair.models.values()])
            each = max(1, (steps[name]["peak_bytes"] or 0) - weights([model.network]))
            # a pipeline that takes one prompt in a call, or gives all of them the same pictures
            alone = model.family.picture_tokens or model.family.one_prompt or model.family.shared_references
            most = 1 if alone else MOST_TOGETHER
            batch = min(most, at_once.pictures(each, at_once.free_bytes(self.device)))
            drawings[name] = self._that_fits(name, side, batch)
        return self._row([one.network for one in self.pair.models.values()], drawings, Recorded.one_step, _network)

    def _that_fits(self, name: str, side: int, batch: int) -> Recorded:
        """A recorded step of ``batch`` pictures, or of half as many as often as that is too much."""
        while True:
            try:
                drawing = self.record(name, side, batch)
                self.bring([one.network for one in self.pair.models.values()])
                drawing.one_step()
            except Exception as error:
                if batch == 1 or not is_out_of_memory(error):
                    raise
            else:
                return drawing
            batch //= 2
            at_once.release()

    def _pictures(self, side: int, drawings: Mapping[str, Recorded], rows: Row) -> Row:
        """The row of the whole picture: measured where all fits and the time allows it, else the sum of its parts."""
        sums = {name: _sum(name, drawing, rows) for name, drawing in drawings.items()}
        if not self.together or 2 * sum(sums.values()) > self.watch.budget:
            return {name: {"seconds": value, "batch": 1, "basis": "sum of its parts"} for name, value in sums.items()}
        models = self.pair.models
        self.bring(part for model in models.values() for part in _parts(model))

        def work(name: str) -> None:
            with self._capped(name, side):
                recording.draw(models[name].pipeline, models[name].family, self.pair.size_of(side), self.settings)

        timings = self.watch.in_turn({name: partial(work, name) for name in models})
        return {
            name: {**_figure(timings[name], 1, _parts(model)), "basis": "measured"} for name, model in models.items()
        }

    def _per_minute(self, name: str, drawing: Recorded, rows: Row) -> float:
        """Pictures per minute: prompts, encoder and decoder one by one, steps in the largest batch that was timed."""
        if BATCH not in rows:
            return 60 / float(rows[PICTURE][name]["seconds"])
        step = rows[BATCH][name]
        faster = {**rows, STEP: {name: {"seconds": step["seconds"] / step["batch"]}}}
        return 60 / _sum(name, drawing, faster)

    def _tokens(self, side: int) -> dict[str, float]:
        """Image tokens that each model sees, and those of the base over those of each other one."""
        size, frames = self.pair.size_of(side), self.pair.frames
        tokens = {name: model.tokens(*size, frames) for name, model in self.pair.models.items()}
        return {**tokens, "ratio": tokens[BASE] / list(tokens.values())[1]}


def measure(pair: ModelPair, sides: list[int], watch: Stopwatch, console: Console) -> list[Row]:
    """The figures at every one of ``sides``, in px.

    Raises:
        InputError: a size that one of the models cannot draw.
    """
    require_sides(pair, sides)
    bench, found, shared = Bench(pair, watch, console), [], None
    with torch.no_grad(), quiet_diffusers(), console.progress("benchmark", len(sides), "size") as bar:
        for side in sides:
            row = bench.size(side, shared)
            shared = {what: row["rows"][what][BASE] for what in SHARED if what in row["rows"]}
            found.append(row)
            bar.advance()
    return found


def require_sides(pair: ModelPair, sides: Iterable[int]) -> None:
    """InputError for a size in px that one of the models cannot draw."""
    for side in sides:
        for model in pair.models.values():
            check_size(model.family, *model.configs, *pair.size_of(side))


def beyond(pair: ModelPair, sides: Iterable[int]) -> list[str]:
    """What is said of the sizes that are larger than those of the base's training."""
    told = []
    for side in sides:
        found = drawable.beyond(pair.identity, side)
        if found is not None:
            shift = "" if found.capped is None else f"; mu is {found.capped:.2f} instead of {found.mu:.2f}"
            told.append(
                f"{found.source} was trained up to {math.isqrt(found.most)} px: at {side} px its times are right, its "
                f"pictures are not{shift}"
            )
    return told


def weights(parts: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers of ``parts``, those that are shared once."""
    found = {id(value): value for part in parts for value in (*part.parameters(), *part.buffers())}
    return sum(value.numel() * value.element_size() for value in found.values())


def _figure(timing: Timing, batch: int, parts: Iterable[nn.Module]) -> Row:
    """A figure of a row. Its "peak_bytes" are the weights of ``parts``, and all that the work takes beside them."""
    found = asdict(timing)
    peak = found.pop("peak")
    return {**found, "batch": batch, "peak_bytes": None if peak is None else weights(parts) + peak}


def _parts(model: Model) -> list[nn.Module]:
    return [*model.encoders, *model.networks, model.pipeline.vae]


def _network(model: Model) -> nn.Module:
    network: nn.Module = model.network
    return network


def _autoencoder(model: Model) -> nn.Module:
    vae: nn.Module = model.pipeline.vae
    return vae


def _sum(name: str, drawing: Recorded, rows: Row) -> float:
    """Seconds of a whole picture, from its parts."""
    once = sum(rows[what][name]["seconds"] for what in (*SHARED, ENCODE, DECODE) if what in rows)
    return float(once + drawing.steps * rows[STEP][name]["seconds"])


def _ratios(row: Row) -> dict[str, float]:
    """Seconds per picture of the base over those of each other model."""
    each = {name: found["seconds"] / found["batch"] for name, found in row.items()}
    return {name: each[BASE] / value for name, value in each.items() if name != BASE}
