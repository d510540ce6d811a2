"""What a stock pipeline asks of its parts to draw a picture, as calls that can be made again and timed.

The pipeline itself runs, up to the decoder. Its network computes the first pass of the drawing only; later passes are
given that result, so that recording 20 steps costs one pass. What is recorded are therefore the inputs, the shapes and
the number of passes that the pipeline has, classifier-free guidance included. Of a model that draws with several
networks the recorded step is the first one's: all are of one size and are asked for the same, so a step of any takes
as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dcgen_convert.data.buckets import Size
from dcgen_convert.families import Family
from dcgen_convert.families.base import Network, Pipeline
from dcgen_convert.networks import pipelines, tiles

PROMPT = "a red fox in the snow"
CLASS = "0"  # of class-conditional models
SEED = 0
KEPT = 8  # passes whose inputs are kept: more than one step has


@dataclass(frozen=True)
class Call:
    """A call that can be made again."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        with torch.no_grad():
            return self.function(*self.args, **self.kwargs)


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn: steps, guidance, text tokens to which prompts are padded, and frames of a video."""

    steps: int
    guidance: float
    length: int
    frames: int = 1


@dataclass(frozen=True)
class Recorded:
    """One drawing of ``batch`` pictures or videos of one ``size``, (height, width) in px.

    text: the calls that encode its prompts; none for class-conditional models. image: those of an image encoder, of a
    pipeline that calls one by itself. references: those that encode the pictures that are edited; none for models that
    draw from text alone. step: the passes of one denoising step. passes:
    of the whole drawing. decode: from latents to pixels. Encoder and decoder work in tiles where pictures are large.
    """

    size: Size
    batch: int
    text: list[Call]
    image: list[Call]
    references: list[Call]
    step: list[Call]
    passes: int
    decode: Call

    @property
    def steps(self) -> float:
        """How many times ``step`` is done for a picture."""
        return self.passes / len(self.step)

    def encode_text(self) -> None:
        for call in self.text:
            call()

    def encode_image(self) -> None:
        for call in self.image:
            call()

    def encode_references(self) -> None:
        for call in self.references:
            call()

    def one_step(self) -> None:
        for call in self.step:
            call()


class _Enough(Exception):
    """All is recorded."""


def record(pipeline: Pipeline, family: Family, size: Size, batch: int, settings: DrawSettings) -> Recorded:
    """Let ``pipeline`` draw, and note what it asks of its parts."""
    networks, vae = pipelines.networks_of(family, pipeline), pipeline.vae
    text: list[Call] = []
    image: list[Call] = []
    references: list[Call] = []
    passes: list[Call] = []
    decoded: list[Call] = []
    counted, first = 0, None

    def forward(network: Network, *args: Any, **kwargs: Any) -> Any:
        nonlocal counted, first
        counted += 1
        if len(passes) < KEPT:
            passes.append(Call(network, args, kwargs))
        if first is None:
            first = compute(*args, **kwargs)
        return first

    def encode(*args: Any, **kwargs: Any) -> Any:
        references.append(Call(partial(in_tiles, "encode"), args, kwargs))
        return references[-1]()

    def decode(*args: Any, **kwargs: Any) -> Any:
        decoded.append(Call(partial(in_tiles, "decode"), args, kwargs))
        raise _Enough

    def in_tiles(way: str, *args: Any, **kwargs: Any) -> Any:
        with tiles.by_size(vae, batch, *size):
            return codec[way](*args, **kwargs)

    compute, codec = networks[0].forward, {"encode": vae.encode, "decode": vae.decode}
    with (
        ExitStack() as replaced,
        _replaced(vae, "encode", encode),
        _replaced(vae, "decode", decode),
        _heard(pipeline, "encode_prompt", text),
        _heard(pipeline, "encode_image", image),
        suppress(_Enough),
    ):
        for network in networks:
            replaced.enter_context(_replaced(network, "forward", partial(forward, network)))
        pipeline(**call_of(pipeline, family, size, batch, settings), output_type="pt")
    per_step = max(1, round(counted / settings.steps))
    assert decoded and per_step <= KEPT, "a stock pipeline decodes, and has few passes per step"
    return Recorded(size, batch, text, image, references, passes[:per_step], counted, decoded[0])


def call_of(pipeline: Pipeline, family: Family, size: Size, batch: int, settings: DrawSettings) -> dict[str, Any]:
    """Keyword arguments for the stock pipeline, with a random number generator for each picture."""
    prompts = [CLASS if "class_labels" in family.text_keys else PROMPT] * batch
    call = family.pipeline_call(
        pipeline,
        prompts,
        height=size[0],
        width=size[1],
        steps=settings.steps,
        guidance=settings.guidance,
        length=settings.length,
    )
    grey = torch.zeros(batch, 3, *size)
    call |= family.reference_call([grey] * family.fewest_references)
    call |= family.frames_call(settings.frames)
    return {**call, "generator": [torch.Generator("cpu").manual_seed(SEED + i) for i in range(batch)]}


def draw(pipeline: Pipeline, family: Family, size: Size, settings: DrawSettings) -> Any:
    """Draw a whole picture, (1, 3, *size), or a video, (1, frames, 3, *size)."""
    with tiles.by_size(pipeline.vae, 1, *size):
        drawn = pipeline(**call_of(pipeline, family, size, 1, settings), output_type="pt")
    return drawn.images if family.axes == 2 else drawn.frames


@contextmanager
def _heard(pipeline: Pipeline, name: str, calls: list[Call]) -> Iterator[None]:
    """Note the calls of the method ``name``, of a pipeline that has it: a class-conditional one encodes no prompts."""
    encode = getattr(pipeline, name, None)
    if encode is None:
        yield
        return

    def heard(*args: Any, **kwargs: Any) -> Any:
        calls.append(Call(encode, args, kwargs))
        return encode(*args, **kwargs)

    with _replaced(pipeline, name, heard):
        yield


@contextmanager
def _replaced(owner: Network, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``owner`` has another method of this name."""
    own = vars(owner).get(name)
    object.__setattr__(owner, name, function)
    try:
        yield
    finally:
        object.__delattr__(owner, name)
        if own is not None:
            object.__setattr__(owner, name, own)
