"""Memory of every stage on each rank, from parameter counts: what its networks weigh, and what their work needs beside.

A stage holds one pipeline, one network or a pair of autoencoders at a time. Where there is a GPU they live there, and
the host holds what is being loaded. Without one the host holds everything. The trainings are counted in memory.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dcgen_convert.core.names import of_set
from dcgen_convert.families import catalog
from dcgen_convert.planning.fit import Fit
from dcgen_convert.planning.memory import CONTEXT, FRAGMENTATION, GIB
from dcgen_convert.planning.shapes import Shapes
from dcgen_convert.recipe.drawable import own_side
from dcgen_convert.recipe.schema import Recipe

PROCESS = 0.7 * GIB  # a Python process that has imported torch, diffusers and DeepSpeed; measured
LIVE = 12  # numbers per token and width that a block keeps alive in a pass without gradients: assumed
FP32 = 4
ENCODE, DECODE = 2564, 2852  # bytes per px of an autoencoder in fp32 at its peak: as networks.at_once counts them
TINY_PIXELS = 0.15  # share of these for the embedded autoencoders
TINY = 20_000_000  # parameters; those have fewer
TOGETHER = 8 * 1024**2  # px that an autoencoder decodes at once at most: as networks.pipelines does


@dataclass(frozen=True)
class Need:
    """Bytes of a stage. weights: networks that are in memory together; each: for one picture; at_once: pictures.

    fixed: beside the networks, whatever the pictures. loaded: what is read from disk at once.
    """

    stage: str
    weights: float
    each: float = 0.0
    at_once: int = 1
    fixed: float = 0.0
    loaded: float = 0.0

    def gpu(self, at_once: int | None = None) -> float:
        """Bytes on a GPU."""
        if not self.weights:
            return 0.0
        work = self.fixed + self.each * (self.at_once if at_once is None else at_once)
        return CONTEXT + (1 + FRAGMENTATION) * (self.weights + work)

    def host(self, on_gpu: bool) -> float:
        """Bytes of one rank in the memory of the machine."""
        if on_gpu:
            return PROCESS + self.loaded
        return PROCESS + max(self.loaded, self.weights + self.fixed + self.each * self.at_once)


@dataclass(frozen=True)
class Peaks:
    """Of a rehearsal. peaks: stage -> {"host", "gpu"} bytes; needs: stage -> what the arithmetic says of it."""

    peaks: dict[str, dict[str, float]]
    needs: dict[str, Need]


def needs(recipe: Recipe, sizes: Shapes, fits: list[Fit]) -> Iterator[Need]:
    """What every stage needs, in order; ``fits``: the decision for each training, that of the head first if any."""
    e = FP32 if recipe.dtype == "fp32" else 2
    base, converted, companions = (
        e * float(count) for count in (sizes.base.parameters, sizes.converted.parameters, sizes.companions)
    )
    sides = [phase.resolution for phase in recipe.adapt.phases]
    entry = catalog.find_autoencoder(recipe.ae)
    codecs = FP32 * float((entry.parameters if entry else 0) + min(sizes.companions, 320_000_000))
    share = TINY_PIXELS if entry is not None and entry.parameters < TINY else 1.0

    def drawing(stage: str, network: float, tokens: int, side: int, batch: int, guidance: float) -> Need:
        width = sizes.converted.width
        passes = LIVE * e * width * (tokens + sizes.text) * sizes.passes(guidance)
        pixels = float(side**2)
        decode = share * DECODE * e / FP32 * min(pixels, max(1.0, TOGETHER / batch))
        return Need(stage, network + companions, max(passes, decode), batch, loaded=network + companions)

    data, last, steps = recipe.data, recipe.adapt.phases[-1], recipe.bundle
    yield Need("surgery", 0.0, loaded=codecs)
    for number in recipe.sets:
        own = recipe.data_of(number)
        if own.kind == "synthetic":
            tokens, stage = sizes.old.tokens(own.resolution), of_set("data", number)
            yield drawing(stage, base, tokens, own.resolution, min(own.batch, own.count), own.guidance)
        batch, side = min(recipe.latents.batch, own.count), max(recipe.sides(number))
        stage = of_set("latents", number)
        yield Need(stage, max(codecs, companions), share * ENCODE * float(side**2), batch, loaded=companions)
    yield Need("align-embedder", 0.0, loaded=FP32 * 8.0 * sizes.base.width * 4096)
    once = LIVE * e * sizes.converted.width * float(sizes.tokens(recipe.adapt.phases[0]))
    sums = 8.0 * 3 * sizes.converted.width**2
    batch = min(recipe.latents.batch, recipe.data_of(recipe.set_of(1)).count)
    head = Need("align-head", converted, once, batch, sums, converted)
    yield _larger(head, fits[0]) if recipe.align_head.steps else head
    for number, fit in enumerate(fits[-len(sides) :], 1):
        yield _larger(Need(f"adapt-{number}", converted, loaded=converted), fit)
        yield Need(f"merge-{number}", max(base, converted), _gap(sizes, e), 1, loaded=max(base, converted))
    side, tokens = last.resolution, sizes.new.tokens(last.resolution)
    if recipe.quantize.format != "none":
        batch = min(recipe.quantize.calibration.batch or data.batch, recipe.quantize.calibration.prompts)
        yield drawing("quantize", converted, tokens, side, batch, steps.guidance)
    yield Need("bundle", 0.0, loaded=GIB / 4)
    count = recipe.evaluate.prompts
    tokens = max(tokens, sizes.old.tokens(own_side(sizes.source, sizes.new, side)))  # of the bundle, or of the source
    verified = drawing("verify", max(base, converted), tokens, side, min(data.batch, count or 1), 2.0)
    yield replace(verified, loaded=verified.loaded + PROCESS)  # a second process draws a picture


def rows(every: list[Need], on_gpu: bool, measured: Peaks | None = None) -> list[dict[str, Any]]:
    """One row per stage: GiB on the GPU and in the host's memory, per rank.

    Where a stage was measured, its row is what was measured, and what the arithmetic adds for the difference between
    the two runs (more pictures at once).
    """
    found = []
    for need in every:
        gpu, host, basis = need.gpu() if on_gpu else 0.0, need.host(on_gpu), "counted"
        if measured and (peak := measured.peaks.get(need.stage)):
            then = measured.needs[need.stage]
            gpu = peak.get("gpu", 0.0) + (need.gpu() - then.gpu() if peak.get("gpu") else 0.0)
            host, basis = peak.get("host", 0.0) + need.host(on_gpu) - then.host(on_gpu), "measured"
        sizes = {"gpu_gib": round(max(0.0, gpu) / GIB, 2), "host_gib": round(max(0.0, host) / GIB, 2)}
        found.append({"stage": need.stage, **sizes, "at_once": need.at_once, "basis": basis})
    return found


def _gap(sizes: Shapes, element: int) -> float:
    """Bytes of the tokens after every block of one picture, and of the pass that makes them."""
    tokens = float(sizes.old.tokens(sizes.alignment.side) + sizes.text)
    return tokens * sizes.base.width * element * (sizes.base.blocks + LIVE)


def _larger(need: Need, fit: Fit) -> Need:
    """The need of a stage that also trains as ``fit`` says."""
    memory = fit.memory
    trained = memory.weights + memory.grads + memory.optimizer + memory.step
    if trained + memory.activations < need.weights + need.fixed + need.each * need.at_once:
        return need
    each = memory.activations / max(1, fit.micro_batch)
    return replace(
        need, weights=trained, each=each, at_once=fit.micro_batch, fixed=0.0, loaded=need.loaded + memory.host
    )
