"""Memory of every stage on each rank, from parameter counts: what its networks weigh, and what their work needs beside.

A stage holds one pipeline, one network or a pair of autoencoders at a time. Where there is a GPU they live there, and
the host holds what is being loaded. Without one the host holds everything. The trainings are counted in memory.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcgen_convert.core.names import of_set
from dcgen_convert.data.buckets import Size
from dcgen_convert.families import catalog, components, deep_autoencoders, pixel_memory
from dcgen_convert.families.experts import WHOLE
from dcgen_convert.families.pixel_memory import DECODE, ENCODE, together
from dcgen_convert.planning.fit import Fit
from dcgen_convert.planning.memory import CONTEXT, FRAGMENTATION, GIB
from dcgen_convert.planning.needs import OF_EVERY_NETWORK
from dcgen_convert.planning.shapes import Shapes
from dcgen_convert.planning.start import group_bytes
from dcgen_convert.recipe import geometry
from dcgen_convert.recipe.drawable import own_side
from dcgen_convert.recipe.schema import Recipe

Config = Mapping[str, Any]
PROCESS = 0.7 * GIB  # a Python process that has imported torch, diffusers and DeepSpeed; measured
LIVE = 12  # numbers per token and width that a block keeps alive in a pass without gradients: assumed
FP32 = 4
DEEP_FACTOR = 32  # a base with this f draws with a deep autoencoder of its own
PIXELS = 100  # bytes per px of a picture that is read, on the host: what is decoded, read ahead, and put together
DRAWN = 48  # bytes per px of a picture that was drawn, on the host: as it came, moved, and in 8 bits
OWN = {  # by the class of the network
    "Flux2Transformer2DModel": "AutoencoderKLFlux2",
    "QwenImageTransformer2DModel": "AutoencoderKLQwenImage",
    "HunyuanImageTransformer2DModel": "AutoencoderKLHunyuanImage",
    "WanTransformer3DModel": "AutoencoderKLWan",
    "SanaVideoTransformer3DModel": "AutoencoderKLWan",
}


@dataclass(frozen=True)
class Need:
    """Bytes of a stage. weights: networks that are in memory together; each: for one picture; at_once: pictures.

    fixed: beside the networks, whatever the pictures. resting: networks that wait for their turn on the host. loaded:
    what is read from disk at once. pixels: of the pictures themselves, on the host.
    """

    stage: str
    weights: float
    each: float = 0.0
    at_once: int = 1
    fixed: float = 0.0
    loaded: float = 0.0
    pixels: float = 0.0
    resting: float = 0.0

    def gpu(self, at_once: int | None = None) -> float:
        """Bytes on a GPU."""
        if not self.weights:
            return 0.0
        work = self.fixed + self.each * (self.at_once if at_once is None else at_once)
        return CONTEXT + (1 + FRAGMENTATION) * (self.weights + work)

    def host(self, on_gpu: bool) -> float:
        """Bytes of one rank in the memory of the machine."""
        if on_gpu:
            return PROCESS + self.loaded + self.pixels
        work = self.fixed + self.each * self.at_once
        return PROCESS + self.pixels + max(self.loaded, self.weights + self.resting + work)


@dataclass(frozen=True)
class Peaks:
    """Of a rehearsal. peaks: stage -> {"host", "gpu"} bytes; needs: stage -> what the arithmetic says of it."""

    peaks: dict[str, dict[str, float]]
    needs: dict[str, Need]


def needs(recipe: Recipe, sizes: Shapes, fits: list[Fit]) -> Iterator[Need]:
    """What every stage needs, in order; ``fits``: the decision for each training, that of the head first if any.

    One network is trained at a time: every network of the model needs the same.
    """
    for need in _of_one_network(recipe, sizes, fits):
        own = sizes.experts if need.stage.startswith(OF_EVERY_NETWORK) else (WHOLE,)
        yield from (replace(need, stage=expert.of(need.stage)) for expert in own)


def _of_one_network(recipe: Recipe, sizes: Shapes, fits: list[Fit]) -> Iterator[Need]:
    """`needs` of a model that has one network."""
    e = FP32 if recipe.dtype == "fp32" else 2
    base, converted, companions = (
        e * float(count) for count in (sizes.base.parameters, sizes.converted.parameters, sizes.companions)
    )
    sides = [phase.resolution for phase in recipe.adapt.phases]
    codecs = FP32 * float(sizes.codec.parameters + min(sizes.companions, 320_000_000))
    ours, theirs = autoencoders_of(recipe, sizes)

    def drawing(
        stage: str,
        network: float,
        codec: Config,
        tokens: int,
        size: Size,
        batch: int,
        guidance: float,
        frames: int = sizes.frames,
    ) -> Need:
        pixels = frames * math.prod(size)
        batch = together(batch, pixels, pixel_memory.DRAWN)
        kept = DRAWN * float(pixels) * batch
        passes = LIVE * e * sizes.converted.width * (tokens + sizes.text) * sizes.passes(guidance)
        decode = work(codec, DECODE, size, batch, frames, "fp32" if e == FP32 else "bf16")
        each = max(passes, decode / batch)
        networks, resting = network + companions, (sizes.networks - 1) * network
        return Need(stage, networks, each, batch, loaded=networks + resting, pixels=kept, resting=resting)

    data, last, steps = recipe.data, recipe.adapt.phases[-1], recipe.bundle
    yield Need("surgery", 0.0, loaded=codecs)
    seen = sizes.alignment.side  # of the pictures that the base sees
    for number in recipe.sets:
        own = recipe.data_of(number)
        if own.kind == "synthetic":
            size, stage = sizes.usual_size(own, own.resolution), of_set("data", number)
            frames = sizes.drawn_frames
            tokens = sizes.seen(sizes.old, *size, frames)
            yield drawing(stage, base, theirs, tokens, size, min(own.batch, own.count), own.guidance, frames)
        side = max(recipe.sides(number))
        batch = together(min(recipe.latents.batch, own.count), sizes.frames * side**2)
        both = [work(ours, way, (side, side), batch, sizes.frames) for way in (ENCODE, DECODE)] + [
            work(theirs, way, (seen, seen), recipe.latents.batch, sizes.frames) for way in (ENCODE, DECODE)
        ]
        read = PIXELS * float(sizes.frames * side**2) * batch
        weights = max(codecs if e == FP32 else 1.5 * codecs, companions)  # in both precisions, until one is chosen
        yield Need(of_set("latents", number), weights, max(both) / batch, batch, loaded=companions, pixels=read)
    yield Need("align-embedder", 0.0, loaded=FP32 * 8.0 * sizes.base.width * 4096)
    once = LIVE * e * sizes.converted.width * float(sizes.tokens(recipe.adapt.phases[0]))
    sums = 8.0 * 3 * sizes.converted.width**2
    batch = min(recipe.latents.batch, recipe.data_of(recipe.aligned_set).count)
    beside = sizes.encoders_beside(recipe)
    head = Need("align-head", converted + beside, once, batch, sums, converted)
    yield _larger(head, fits[0], beside) if recipe.align_head.steps else head
    for number, fit in enumerate(fits[-len(sides) :], 1):
        sums = group_bytes(sizes.lora_layers(recipe.adapt.phases[0])) if recipe.starts_along_gradient(number) else 0.0
        yield _larger(Need(f"adapt-{number}", converted + beside, once, fixed=sums, loaded=converted), fit, beside)
        yield Need(f"merge-{number}", max(base, converted), _gap(sizes, e), 1, loaded=max(base, converted))
    size = sizes.usual_size(recipe.data_of(recipe.set_of(len(sides))), last.resolution)
    tokens = sizes.seen(sizes.new, *size)
    if recipe.quantize.format != "none":
        batch = min(recipe.quantize.calibration.batch or data.batch, recipe.quantize.calibration.prompts)
        yield drawing("quantize", converted, ours, tokens, size, batch, steps.guidance)
    yield Need("bundle", 0.0, loaded=GIB / 4)
    count = recipe.evaluate.prompts
    side = own_side(sizes.source, sizes.new, last.resolution)
    tokens = max(tokens, sizes.seen(sizes.old, *(size if side == last.resolution else (side, side))))
    verified = drawing("verify", max(base, converted), ours, tokens, size, min(data.batch, count or 1), 2.0)
    trip = Need("verify", codecs, max(work(ours, way, size, 1, sizes.frames) for way in (ENCODE, DECODE)))
    if trip.gpu(1) > verified.gpu():
        verified = replace(verified, weights=trip.weights, each=trip.each, at_once=1)
    yield replace(verified, loaded=verified.loaded + PROCESS)  # a second process draws a picture


def autoencoders_of(recipe: Recipe, sizes: Shapes) -> tuple[Config, Config]:
    """Configs of the new autoencoder and of the base's; of one that is not at hand, of the largest of its kind."""
    reader, entry, source = sizes.source.reader, catalog.find_autoencoder(recipe.ae), sizes.source
    if entry is not None and (entry.given or deep_autoencoders.kind_of(entry) is not None):
        ours: Config = deep_autoencoders.config_of(entry)
    elif entry is not None:
        ours = reader.optional(Path(entry.where) / "config.json") or {}
    else:
        ours = geometry.config_of(recipe.ae, source.offline, reader)
    folder = source.entry.folder if source.entry else None
    theirs = source.vae or (reader.optional(folder / "vae" / "config.json") if folder else None)
    if theirs is None and source.entry and sizes.family.axes == 3:
        vae = components.layout_of(source.entry).parts["vae"]
        theirs = {"_class_name": vae.kind, **vae.config}
    if theirs is None and sizes.old.f >= DEEP_FACTOR and sizes.family.model_class not in OWN:
        theirs = {}
    theirs = theirs if theirs is not None else {"_class_name": OWN.get(sizes.family.model_class, "AutoencoderKL")}
    return ours, theirs


def work(codec: Config, way: int, size: Size, count: int, frames: int = 1, dtype: str = "fp32") -> float:
    """Bytes that an autoencoder works with for ``count`` pictures of ``size`` px; it takes large ones one by one."""
    picture = float(pixel_memory.peak_bytes(codec, dtype, way, *size, frames))
    return picture * together(count, frames * math.prod(size))


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
    tokens = float(sizes.seen(sizes.old, sizes.alignment.side) + sizes.text)
    return tokens * sizes.base.width * element * (sizes.base.blocks + LIVE)


def _larger(need: Need, fit: Fit, beside: float) -> Need:
    """The need of a stage that also trains as ``fit`` says; ``beside``: bytes of networks that it holds too."""
    memory = fit.memory
    trained = beside + memory.weights + memory.grads + memory.optimizer + memory.step
    if trained + memory.activations < need.weights + need.fixed + need.each * need.at_once:
        return need
    each = memory.activations / max(1, fit.micro_batch)
    return replace(
        need, weights=trained, each=each, at_once=fit.micro_batch, fixed=0.0, loaded=need.loaded + memory.host
    )
