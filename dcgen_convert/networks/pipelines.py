"""The stock pipeline of a source: loading all or only its text encoders, and drawing with one seed per picture."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from dcgen_convert import families
from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.source import Source
from dcgen_convert.core import clock, pulse
from dcgen_convert.core.bars import quieted
from dcgen_convert.core.errors import InputError
from dcgen_convert.families import Family, Text
from dcgen_convert.families.base import NULL, Pipeline
from dcgen_convert.networks import parts, processors, tiles
from dcgen_convert.networks.wide import widen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device() -> str:
    """Where networks run: a GPU if this machine has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_pipeline(source: Source, dtype: torch.dtype, **components: Any) -> Pipeline:
    """The stock pipeline of the source. ``components`` replace its parts; None leaves a part out.

    The safety checker is always left out: pictures that it paints black are useless as training data. So are the parts
    that the family leaves idle.
    """
    components = {**{part: None for part in source.family.idle if part in source.index}, **components}
    if "safety_checker" in source.index:
        components = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **components}
    components = {**processors.without_torchvision(source.root, source.index), **components}
    require_parts(source, components)
    parts.check(source.root, {part: value for part, value in source.index.items() if part not in components})
    with quiet_diffusers():
        pipeline = stock_pipeline(source.family, source.index).from_pretrained(
            source.root, dtype=dtype, use_safetensors=True, trust_remote_code=False, **components
        )
    pipeline.set_progress_bar_config(disable=True)
    for network in networks_of(source.family, pipeline):  # a sign of life per pass: a batch may take many minutes
        network.register_forward_hook(pulse.bump)
    return placed(pipeline, device())


def networks_of(family: Family, pipeline: Pipeline) -> list[nn.Module]:
    """The networks that ``pipeline`` has loaded of those that it draws with."""
    found = (getattr(pipeline, name) for name in family.components)
    return [network for network in found if network is not None]


def take_turns(networks: Sequence[nn.Module], where: str) -> None:
    """Let each of ``networks`` come to the device ``where`` when it is called, and the others leave it for the CPU."""

    def come(network: nn.Module, *_: Any) -> None:
        if next(network.parameters()).device.type == torch.device(where).type:
            return
        for other in networks:
            if other is not network:
                other.to("cpu")
        network.to(where)

    for network in networks:
        network.register_forward_pre_hook(come)


def placed(pipeline: Pipeline, where: str) -> Pipeline:
    """The pipeline on the device ``where``, ready to compute there. Of several networks that it draws with one is there
    at a time.
    """
    found = (getattr(pipeline, name, None) for name in families.EVERY_COMPONENT)
    networks = [network for network in found if network is not None]
    if len(networks) > 1 and where != "cpu":
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and all(part is not other for other in networks[1:]):
                part.to(where)
        take_turns(networks, where)
    else:
        pipeline.to(where)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            widen(part)
    return pipeline


def load_text_encoders(source: Source, dtype: torch.dtype) -> Pipeline:
    """The pipeline without transformer and autoencoder. It can encode prompts."""
    return load_pipeline(source, dtype, **dict.fromkeys((*source.family.components, "vae")))


@torch.no_grad()
def encode_text(
    family: Family,
    pipeline: Pipeline,
    prompts: Sequence[str],
    length: int,
    pictures: Sequence[Sequence[Image]] = (),
) -> Text:
    """Conditions of the B ``prompts``; each tensor is (B, ...) and on the CPU.

    Args:
        pictures: the references of each prompt. A family whose text encoder sees them reads them: its conditions hold
            that of the empty prompt beside the same references too, under `base.NULL`.
    """
    if not family.picture_tokens:
        found = family.encode_text(pipeline, list(prompts), length)
    else:
        found = family.encode_seen(pipeline, list(prompts), length, pictures)
        null = family.encode_seen(pipeline, [""] * len(prompts), length, pictures)
        found = {**found, **{NULL + key: value for key, value in null.items()}}
    return {key: value.cpu() for key, value in found.items()}


@torch.no_grad()
def draw(  # noqa: PLR0913  what a pipeline is called with
    family: Family,
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    side: int,
    steps: int,
    guidance: float,
    length: int,
    references: Sequence[Sequence[Tensor]] = (),
    frames: int = 1,
    width: int | None = None,
) -> Tensor:
    """Pictures of ``prompts``, (B, 3, side, side) in [-1, 1]; videos of a family of videos, (B, 3, frames, side, side).

    The noise of a picture follows from its seed. In another batch its pixels are the same but for rounding.

    Args:
        width: in px, of pictures that are no squares; None: ``side``.
        references: what an editing model is given with each prompt, (3, H, W) in [-1, 1] each; empty where the prompts
            have none. Prompts of one number and sizes are drawn together, if the family's pipeline can.
    """
    shapes = {tuple(one.shape for one in own) for own in references}
    if len(prompts) > 1 and (family.one_prompt or len(shapes) > 1 or (shapes and family.shared_references)):
        settings: dict[str, Any] = dict(side=side, steps=steps, guidance=guidance, length=length)
        settings |= {"frames": frames, "width": width}
        each = zip(prompts, seeds, references or [()] * len(prompts), strict=True)
        parts = [draw(family, pipeline, [text], [seed], **settings, references=[own]) for text, seed, own in each]
        return torch.cat(parts)
    size = {"height": side, "width": width or side}
    call = family.pipeline_call(pipeline, list(prompts), **size, steps=steps, guidance=guidance, length=length)
    call |= family.reference_call([torch.stack(slot) for slot in zip(*references, strict=True)])
    call |= family.frames_call(frames)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with (
        tiles.by_size(pipeline.vae, len(prompts), **size),
        passes_timed(networks_of(family, pipeline), pictures=len(prompts), steps=steps),
    ):
        drawn = pipeline(**call, generator=generators, output_type="pt")
    pixels = drawn.images if family.axes == 2 else drawn.frames.movedim(1, 2)
    return pixels.float().cpu() * 2 - 1


@contextmanager
def passes_timed(networks: Sequence[nn.Module], pictures: int, steps: int) -> Iterator[None]:
    """Tell the clock of a rehearsal how long the text encoders, the passes of ``networks`` and the autoencoder take."""
    running = clock.running()
    if running is None:
        yield
        return
    times = [running.now()]  # the start, then before and after every pass
    note = lambda *_: times.append(running.now())  # noqa: E731
    hooks = [network.register_forward_pre_hook(note) for network in networks]
    hooks += [network.register_forward_hook(note) for network in networks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    end, passes = running.now(), times[1:]
    running.add("encode prompts", pictures, passes[0] - times[0])
    each = pictures * steps * 2 / len(passes)  # classifier-free guidance may be two passes, or one of twice the size
    for begun, ended in zip(passes[::2], [*passes[2::2], passes[-1]], strict=True):
        running.add("draw", each, ended - begun)  # up to the next pass: the scheduler's work belongs to the step
    running.add("decode", pictures, end - passes[-1])


def quiet_diffusers() -> AbstractContextManager[None]:
    """Hide the progress bars of diffusers, and its warning that the autoencoder is not an AutoencoderKL."""
    from diffusers.utils import logging

    return quieted(logging)


def require_parts(source: Source, given: Container[str] = ()) -> None:
    """InputError when the source's model_index.json lacks a part that its pipeline cannot draw without.

    Args:
        given: parts that come from elsewhere.
    """
    cls = stock_pipeline(source.family, source.index)
    wanted, _ = cls._get_signature_keys(cls)
    missing = set(wanted) - set(cls._optional_components) - trust.components(source.index).keys()
    if lost := sorted(part for part in missing if part not in given):
        raise InputError(
            f"{source.name} has no {' and no '.join(lost)}, which a {cls.__name__} draws with",
            "give the whole checkpoint: the text encoders are needed to train with captions",
        )


def stock_pipeline(family: Family, index: dict[str, Any]) -> Any:
    """The diffusers class that draws with a source of this model_index.json."""
    import diffusers

    return getattr(diffusers, family.pipeline_of(index))
