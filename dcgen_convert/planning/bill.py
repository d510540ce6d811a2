"""The bill of a conversion: every stage that takes time, on N ranks, from counted work and the rates of a device.

A stage is a list of kinds of work. Each has a count (pictures, steps, bytes), the cost of one unit, and whether the
ranks share it. What is not shared is done by rank 0 while the others wait, so it costs N times its GPU-hours.

A rehearsal measures the seconds of one unit, which take the place of the assumed rate, and of each stage the rest: what
a stage takes beyond these units. Work that does not grow with pictures and steps (`fixed`) is part of that rest.

N tokens of a picture, D width of the transformer, K input channels of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dcgen_convert.core import names
from dcgen_convert.data.held_out import held_out_rows
from dcgen_convert.planning import start
from dcgen_convert.planning.arithmetic import forward_flops, side_passes, train_flops
from dcgen_convert.planning.costs import (
    BF16,
    LATENT,
    latent_bytes,
    network_bytes,
    of_alignment,
    paired_pictures,
    picture_bytes,
    text_bytes,
)
from dcgen_convert.planning.rates import CPUS, H100, Device
from dcgen_convert.planning.shapes import Shapes
from dcgen_convert.recipe.drawable import own_side
from dcgen_convert.recipe.head_rows import LEVELS, head_samples
from dcgen_convert.recipe.schema import Phase, Recipe

SMALL = 100_000_000
"""Models below this many parameters are planned for two CPU cores, larger ones for H100s."""
ENCODE, DECODE = 5e6, 9e6
"""FLOPs per pixel of an autoencoder at full width. Counted by torch on the published configs: AutoencoderKL 4.2 and 9.5
million, DC-AE f32 and f64 4.9 and 8.0 million, and of each frame AutoencoderKLWan 5.0 and 8.5 million."""
ENCODE_VIDEO, DECODE_VIDEO = 31e6, 34e6  # the same of each frame, of DC-AE-V
ENCODE_LTX, DECODE_LTX = 2.9e6, 1.3e6  # the same of LTX-2's, which begins with blocks of 4 x 4 px
TINY_AUTOENCODER = 20_000_000  # parameters; one below is taken for a miniature, whose FLOPs are:
ENCODE_TINY, DECODE_TINY = 16e3, 33e3  # counted by torch on the embedded ones: 12 to 19 and 19 to 43 thousand
SMOOTHINGS = 21  # candidates of svdquant.smooth
ROUNDINGS = 3  # passes of GPTQ over a layer: the first and two refits
CHECKPOINT_SECONDS = 600.0  # between two checkpoints of a training
GAP_PICTURES = 32


@dataclass(frozen=True)
class Work:
    """One kind of work of a stage.

    Attributes:
        what: its name, unique in the stage; a rehearsal measures the same names.
        count, unit: how often it is done, and what is counted.
        kind: the rate of `rates.Device` that it is measured in.
        each: FLOPs, bytes, pixels or columns of one unit.
        shared: whether the ranks divide it among them.
        fixed: whether it is the same however many pictures are taken and steps done.
    """

    stage: str
    what: str
    count: float
    unit: str
    kind: str
    each: float
    shared: bool = True
    fixed: bool = False


@dataclass(frozen=True)
class Measured:
    """What a rehearsal measured of a stage, on one rank. each: kind of work -> seconds of one unit; rest: seconds."""

    each: dict[str, float]
    rest: float


class Observed(Protocol):
    """What a bill reads of a rehearsal."""

    @property
    def stages(self) -> dict[str, Measured]: ...

    @property
    def machine(self) -> Device: ...


def device_for(sizes: Shapes) -> Device:
    """What a model of this size is planned for."""
    return CPUS if sizes.base.parameters < SMALL else H100


def works(recipe: Recipe, sizes: Shapes, gpus: int = 1) -> Iterator[Work]:
    """All work of a conversion on ``gpus`` ranks, stage by stage."""
    yield from _prepared(sizes)
    for number in recipe.sets:
        yield from _data(recipe, sizes, number)
        yield from _latents(recipe, sizes, number)
    yield from _of_every_network(_aligned(recipe, sizes), sizes)
    for number, phase in enumerate(recipe.adapt.phases, 1):
        yield from _of_every_network(_phase(recipe, sizes, phase, number, gpus), sizes)
    if recipe.quantize.format != "none":
        yield from _quantised(recipe, sizes)
    yield from _finished(recipe, sizes)


def _of_every_network(every: Iterator[Work], sizes: Shapes) -> Iterator[Work]:
    """The work of the stages of one network, stage by stage for every network of the model."""
    found = list(every)
    for stage in dict.fromkeys(work.stage for work in found):
        for expert in sizes.experts:
            yield from (replace(work, stage=expert.of(stage)) for work in found if work.stage == stage)


def bill(recipe: Recipe, sizes: Shapes, gpus: int, rehearsed: Observed | None = None) -> dict:
    """Wall-clock hours, GPU-hours and price, in all and of every stage, each with its range and basis.

    Args:
        gpus: ranks that share the work.
        rehearsed: what a rehearsal found, of the device that is planned for.
    """
    device = rehearsed.machine if rehearsed else device_for(sizes)
    known = rehearsed.stages if rehearsed else {}
    rows: dict[str, dict[str, Any]] = {}
    for work in _with_rests(works(recipe, sizes, gpus), known):
        if not work.count:
            continue
        found = known.get(work.stage)
        part = _priced(work, device, gpus, found.each.get(work.what) if found else None)
        row = rows.setdefault(work.stage, {"stage": work.stage, **dict.fromkeys(HOURS, 0.0), "work": []})
        for key in HOURS:
            row[key] += part[key]
        row["work"].append(part)
    stages = [{**row, "gpu_hours": row["wall_hours"] * gpus} for row in rows.values()]
    total = {key: sum(row[key] for row in stages) for key in (*HOURS, "gpu_hours")}
    found = sum(part["basis"] == "measured" for row in stages for part in row["work"])
    basis = f"counted work; rates assumed: {device.assumed}"
    if any(recipe.data_of(number).kind == "folder" for number in recipe.sets):
        basis += "; your pictures are taken to be as large as the phase that they are for"
    if found:
        basis = f"{found} of {sum(len(row['work']) for row in stages)} kinds of work measured in a rehearsal; {basis}"
    return {
        "device": device.name,
        "gpus": gpus,
        **total,
        "price_usd": total["gpu_hours"] * device.price,
        "stages": stages,
        "basis": basis,
    }


HOURS = ("wall_hours", "wall_hours_low", "wall_hours_high")
REST = "the rest"


def _with_rests(every: Iterator[Work], known: dict[str, Measured]) -> Iterator[Work]:
    """The work, with the measured rest of a stage in place of what is fixed in it."""
    begun: set[str] = set()
    for work in every:
        if work.stage not in known:
            yield work
            continue
        if work.stage not in begun:
            begun.add(work.stage)
            yield Work(work.stage, REST, 1, "stages", REST, known[work.stage].rest, False)
        if not work.fixed:
            yield work


def _priced(work: Work, device: Device, gpus: int, measured: float | None) -> dict[str, Any]:
    """A kind of work with its wall-clock hours."""
    ranks = min(gpus, max(1, math.ceil(work.count))) if work.shared else 1
    if work.kind == REST:
        measured = work.each
    if measured is not None:
        seconds = low = high = work.count * measured
    else:
        rate, total = device.rates[work.kind], work.count * work.each
        seconds, low, high = total / rate.expected, total / rate.fast, total / rate.slow
    hours = {key: value / ranks / 3600 for key, value in zip(HOURS, (seconds, low, high), strict=True)}
    return {
        "what": work.what,
        "count": work.count,
        "unit": work.unit,
        "shared": work.shared,
        **hours,
        "basis": "assumed" if measured is None else "measured",
    }


def _fixed(stage: str, what: str, count: float, unit: str, kind: str, each: float = 1) -> Work:
    """Work of rank 0 that does not grow with pictures and steps."""
    return Work(stage, what, count, unit, kind, each, shared=False, fixed=True)


def _prepared(sizes: Shapes) -> Iterator[Work]:
    dense = BF16 * sizes.networks * sizes.base.parameters
    if sizes.source.hub_id:
        yield Work("download", "fetch", dense + BF16 * sizes.companions, "bytes", "network", 1, False)
    yield _fixed("start", "import the libraries", 1, "processes", "starts")
    yield _fixed("start", "hash the source", dense + BF16 * sizes.companions, "bytes", "hash")
    copied = _fixed("surgery", "copy", 2 * BF16 * sizes.base.parameters, "bytes", "disk")
    yield from _of_every_network(iter([copied]), sizes)


def _pixels(recipe: Recipe, sizes: Shapes, number: int) -> float:
    """Pixels of one picture of set ``number``, or of a video in all its frames: as it is drawn, or as large as it must
    be at least.
    """
    data = recipe.data_of(number)
    side = max(recipe.sides(number))
    size = sizes.usual_size(data, data.resolution) if data.kind == "synthetic" else (side, side)
    return float(sizes.frames * math.prod(size))


def _data(recipe: Recipe, sizes: Shapes, number: int) -> Iterator[Work]:
    stage, data = names.of_set("data", number), recipe.data_of(number)
    pixels = _pixels(recipe, sizes, number)
    if data.kind == "folder":
        yield Work(stage, "hash", data.count, "pictures", "hash", pixels, False)
        if copied := picture_bytes(recipe, sizes, number):
            yield Work(stage, "copy out of shards", data.count, "pictures", "disk", 2 * copied / data.count, False)
        return
    passes = sizes.passes(data.guidance)
    size, frames = sizes.usual_size(data, data.resolution), sizes.drawn_frames
    once = forward_flops(sizes.base, sizes.seen(sizes.old, *size, frames), sizes.text)
    decode = frames * math.prod(size) * _base_flops(sizes)[1]
    loaded = sizes.networks * sizes.base.parameters + sizes.companions
    yield _fixed(stage, "load", BF16 * loaded, "bytes", "disk")
    yield Work(stage, "encode prompts", data.count, "pictures", "matmul", passes * _text_flops(sizes))
    yield Work(stage, "draw", data.count * data.steps, "denoising steps", "matmul", passes * once)
    yield Work(stage, "decode", data.count, "pictures", "convolution", decode)
    yield Work(stage, "write", data.count, "pictures", "pixels", pixels)


def _latents(recipe: Recipe, sizes: Shapes, number: int) -> Iterator[Work]:
    stage, data, sides = names.of_set("latents", number), recipe.data_of(number), recipe.sides(number)
    source, each = _pixels(recipe, sizes, number), 1 + sizes.references
    paired = paired_pictures(recipe, sizes, number)
    files, again = data.count * each, paired * each  # the base's autoencoder has its own look at them
    yield Work(stage, "check", files, "pictures", "decoding", source, False)
    yield Work(stage, "read", files * len(sides) + again, "pictures", "decoding", source)
    yield _fixed(stage, "load", BF16 * sizes.companions, "bytes", "disk")
    new, old = (sizes.frames * float(area) for area in (sum(s**2 for s in sides), sizes.alignment.side**2))
    yield Work(stage, "encode", files * new, "pixels", "convolution", _new_flops(sizes)[0])
    yield Work(stage, "encode for the base", again * old, "pixels", "convolution", _base_flops(sizes)[0])
    written = latent_bytes(recipe, sizes, number) + data.count * text_bytes(recipe, sizes)
    rows = data.count * len(sides) + paired
    yield Work(stage, "write", rows, "pictures", "disk", written / rows, False)
    if recipe.latents.text == "cache":
        yield Work(stage, "encode captions", data.count, "captions", "matmul", _text_flops(sizes))


def _aligned(recipe: Recipe, sizes: Shapes) -> Iterator[Work]:
    recipe = of_alignment(recipe)
    align, first = recipe.align_head, recipe.adapt.phases[0]
    cells = sizes.latent_numbers([first.resolution])
    paired, inputs = paired_pictures(recipe, sizes, recipe.aligned_set), sizes.alignment_rows[0]
    yield Work("align-embedder", "read latents", paired, "pictures", "disk", LATENT * cells, False)
    solve = 2.0 * sizes.drawn(sizes.new, first.resolution) * (inputs + 1) * (inputs + sizes.base.width)
    yield Work("align-embedder", "sum", paired, "pictures", "float32", solve, False)
    yield _fixed("align-head", "load", BF16 * sizes.converted.parameters, "bytes", "disk")
    once = _once(sizes, first)
    tokens, width = sizes.drawn(sizes.new, first.resolution), sizes.base.width
    fit = head_samples(recipe, width, tokens)
    yield Work("align-head", "start", fit.usual + fit.held_out, "samples", "matmul", fit.passes * once)
    yield Work("align-head", "sum", fit.usual, "samples", "float32", 2.0 * tokens * width**2)
    looks = 2 if align.steps else 1
    looked = looks * held_out_rows(recipe.data.count)
    yield Work("align-head", "evaluate", looked, "pictures", "matmul", _looked(recipe, once), False)
    if align.steps:
        yield Work("align-head", "train", align.steps * align.batch, "samples", "matmul", _trained(recipe, first, once))


def _phase(recipe: Recipe, sizes: Shapes, phase: Phase, number: int, gpus: int) -> Iterator[Work]:
    name, once, watch = f"adapt-{number}", _once(sizes, phase), recipe.watch
    each = _trained(recipe, phase, once)
    if recipe.latents.text == "encode":
        each += _text_flops(sizes)
    yield _fixed(name, "load", BF16 * sizes.converted.parameters, "bytes", "disk")
    if number == 1 and (begin := start.samples(recipe, sizes, gpus)):
        yield Work(name, "start", begin, "samples", "matmul", each)
    yield Work(name, "train", phase.steps * phase.batch, "samples", "matmul", each)
    held_out = held_out_rows(recipe.data_of(recipe.set_of(number)).count)
    looks = 2 + (phase.steps // watch.evaluate_every if watch.evaluate_every else 0)
    yield Work(name, "evaluate", looks * held_out, "pictures", "matmul", _looked(recipe, once))
    if watch.grid_every:
        drawn = phase.steps // watch.grid_every * watch.pictures
        yield Work(name, "grids", drawn * recipe.bundle.steps, "denoising steps", "matmul", once, False)
    state = 16.0 * sizes.trainable(phase).trained
    rate = device_for(sizes).rates["matmul"].expected
    saves = 1 + int(phase.steps * phase.batch * each / rate / gpus / CHECKPOINT_SECONDS)
    yield Work(name, "checkpoints", saves, "checkpoints", "disk", state, False)
    dense = BF16 * sizes.converted.parameters
    yield _fixed(f"merge-{number}", "merge", 2 * dense, "bytes", "disk")
    yield _fixed(f"merge-{number}", "load", 2 * dense, "bytes", "disk")
    both = _once(sizes, recipe.adapt.phases[0])
    both += forward_flops(sizes.base, sizes.seen(sizes.old, sizes.alignment.side), sizes.text)
    pictures = min(GAP_PICTURES, held_out)
    yield Work(f"merge-{number}", "gap", 2 * pictures, "passes", "matmul", both / 2, False)


def _quantised(recipe: Recipe, sizes: Shapes) -> Iterator[Work]:
    section, last = recipe.quantize, recipe.adapt.phases[-1]
    once = _once(sizes, last)
    steps = section.calibration.steps or recipe.bundle.steps
    calls = section.calibration.prompts * steps
    guided = sizes.passes(recipe.bundle.guidance)
    yield Work("quantize", "draw", calls, "denoising steps", "matmul", guided * once)
    prompts, decode = section.calibration.prompts, last.resolution**2 * _new_flops(sizes)[1]
    yield Work("quantize", "encode prompts", prompts, "pictures", "matmul", guided * _text_flops(sizes))
    yield Work("quantize", "decode", prompts, "pictures", "convolution", decode)
    yield Work("quantize", "run the blocks", guided * calls, "forward passes", "matmul", once, False)
    spool = 2.0 * BF16 * sizes.tokens(last) * sizes.converted.width * sizes.converted.blocks
    yield Work("quantize", "keep block outputs", guided * calls, "forward passes", "disk", spool, False)
    linears = {layer.name: layer for layer in sizes.converted.layers if not layer.convolution}
    shapes = {name: (layer.outputs, layer.inputs) for name, layer in linears.items()}
    layers = [linears[name] for name in sizes.family.quant_targets(shapes, section.dense, section.container).svdq]
    flops = sum(layer_flops(layer.outputs, layer.inputs, section.rank) for layer in layers)
    yield Work(
        "quantize", "decompose", len(layers), "linears", "float32", flops / max(1, len(layers)), fixed=True
    )  # fmt: skip
    columns = ROUNDINGS * sum(layer.inputs for layer in layers)
    yield Work("quantize", "round", columns, "columns", "columns", 1, fixed=True)
    yield _fixed("quantize", "write", 2 * network_bytes(recipe, sizes), "bytes", "disk")


def layer_flops(outputs: int, inputs: int, rank: int) -> float:
    """FLOPs of SVDQuant on one linear: the Hessian of its inputs, the search for the smoothing, GPTQ."""
    hessian = 2.0 * 32_768 * inputs**2 + inputs**3 / 3
    smoothing = SMOOTHINGS * (6.0 * outputs * inputs * (rank + 16) + 2.0 * 512 * 512 * inputs)
    return hessian + smoothing + ROUNDINGS * float(outputs) * inputs**2


def _finished(recipe: Recipe, sizes: Shapes) -> Iterator[Work]:
    whole = sizes.networks * network_bytes(recipe, sizes) + BF16 * sizes.companions
    yield _fixed("bundle", "copy", 2 * whole, "bytes", "disk")
    yield _fixed("bundle", "hash", whole, "bytes", "hash")
    yield _fixed("verify", "start", 1, "processes", "starts")
    yield _fixed("verify", "hash", whole, "bytes", "hash")
    yield _fixed("verify", "load", 3 * whole, "bytes", "disk")
    count, last = recipe.evaluate.prompts, recipe.adapt.phases[-1]
    if count:
        data, own = recipe.data, own_side(sizes.source, sizes.new, last.resolution)
        size = sizes.usual_size(recipe.data_of(recipe.set_of(len(recipe.adapt.phases))), last.resolution)
        pixels = float(sizes.frames * math.prod(size))
        tokens = sizes.seen(sizes.old, *(size if own == last.resolution else (own, own)))
        base = forward_flops(sizes.base, tokens, sizes.text) * sizes.passes(data.guidance)
        of_base = count * (2 if recipe.evaluate.measures else 1)  # with the noise floor
        yield Work("verify", "draw with the source", of_base * data.steps, "denoising steps", "matmul", base, False)
        models = ["draw with the bundle", *([] if recipe.quantize.format == "none" else ["draw in 16 bits"])]
        once = forward_flops(sizes.converted, sizes.seen(sizes.new, *size), sizes.text)
        each = sizes.passes(recipe.bundle.guidance) * once
        for name in models:
            yield Work("verify", name, count * recipe.bundle.steps, "denoising steps", "matmul", each, False)
        drawn, (encode, new), old = (
            of_base + len(models) * count,
            _new_flops(sizes),
            _base_flops(sizes)[1],
        )
        yield Work("verify", "encode prompts", drawn, "pictures", "matmul", _text_flops(sizes), False)
        decode = pixels * (len(models) * new + old) / (1 + len(models))
        yield Work("verify", "decode", drawn, "pictures", "convolution", decode, False)
        yield Work("verify", "round trip", count, "pictures", "convolution", pixels * (encode + new), False)


def _once(sizes: Shapes, phase: Phase) -> float:
    """FLOPs of one forward pass of the converted model for one picture."""
    return forward_flops(sizes.converted, sizes.seen(sizes.new, phase.resolution), sizes.text)


def _trained(recipe: Recipe, phase: Phase, once: float) -> float:
    passes = side_passes(recipe.adapt, phase.consistency)
    return train_flops(once, full=phase.mode == "full", checkpointing=recipe.adapt.checkpointing, passes=passes)


def _looked(recipe: Recipe, once: float) -> float:
    """FLOPs of the held-out loss of one picture, at every level of noise."""
    return LEVELS * (1 + side_passes(recipe.adapt)) * once


def _text_flops(sizes: Shapes) -> float:
    """FLOPs of encoding one prompt: nearly all of the companions' parameters are those of the text encoder."""
    return 2.0 * sizes.companions * sizes.text * sizes.conditions


def _base_flops(sizes: Shapes) -> tuple[float, float]:
    """FLOPs per pixel of the base's autoencoder: (encode, decode)."""
    return (ENCODE_TINY, DECODE_TINY) if sizes.base.parameters < SMALL else (ENCODE, DECODE)


def _new_flops(sizes: Shapes) -> tuple[float, float]:
    """The same of the new autoencoder."""
    if 0 < sizes.codec.parameters < TINY_AUTOENCODER:
        return ENCODE_TINY, DECODE_TINY
    if sizes.new.time.alone:  # which LTX-2's has and DC-AE-V has not
        return ENCODE_LTX, DECODE_LTX
    return (ENCODE, DECODE) if sizes.family.axes == 2 else (ENCODE_VIDEO, DECODE_VIDEO)
