"""The two halves of the page of `serve`: a bundle and, where it is at hand, the base that it was made from.

Both draw the same text from the same seed. The bundle's pictures are those of `sample`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from dcgen_convert.bundle import loading, sample
from dcgen_convert.bundle import manifest as manifests
from dcgen_convert.checkpoint.imported import Imported
from dcgen_convert.checkpoint.source import Source
from dcgen_convert.core.console import Console
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.data import videos
from dcgen_convert.families import Family
from dcgen_convert.families.base import Pipeline
from dcgen_convert.families.grid import Grid
from dcgen_convert.judging import painter
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe.drawable import own_side
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.sources import require_source
from dcgen_convert.stages import source_pipeline

Size = tuple[int, int]  # width and height in px
SHAPES = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))  # width to height
SCALES = (1.0, 0.5)  # of the sides that the bundle draws by itself


@dataclass(frozen=True)
class Fields:
    """What the fields of the page hold. images: files with the pictures that a model which edits is given."""

    prompt: str
    size: Size
    seed: int
    steps: int
    guidance: float
    images: Sequence[Path] = ()


@dataclass(frozen=True)
class Outcome:
    """A picture, and how it was drawn: its size in px, and the seconds without the loading of the model.

    picture: of a video its frames instead, (3, F, H, W) in [-1, 1]; fps: so many of them a second.
    """

    picture: Image | Tensor
    size: Size
    seconds: float
    fps: float = 0


@dataclass(frozen=True)
class Half:
    """A model that draws. It is loaded before its first picture.

    Attributes:
        name: for people. config, vae: of its network and of its autoencoder. length: in text tokens. frames: of each
            video; 1: it draws pictures. fps: frames a second of a video.
        opened: loads the pipeline. fit: the size at which it draws what is asked for at another one.
    """

    name: str
    family: Family
    config: dict[str, Any]
    vae: dict[str, Any]
    length: int
    opened: Callable[[], Pipeline]
    fit: Callable[[Size], Size]
    frames: int = 1
    fps: float = 0

    @cached_property
    def pipeline(self) -> Pipeline:
        return self.opened()

    def draw(self, wanted: Fields) -> Outcome:
        """One picture, or one video.

        Raises:
            InputError: a size that does not fit, no picture to edit, or one that cannot be used.
            CheckFailed: a picture that is not finite.
        """
        sample.require_images(self.family, wanted.images)
        width, height = self.fit(wanted.size)
        sample.check_size(self.family, self.config, self.vae, height, width)
        cell = sample.token_side(self.family, self.config, self.vae)
        references = sample.references_of(self.family, wanted.images, height, width, cell)
        pipeline = self.pipeline
        started = time.perf_counter()
        pixels = sample.draw_pixels(
            pipeline,
            self.family,
            [wanted.prompt],
            [wanted.seed],
            height=height,
            width=width,
            steps=wanted.steps,
            guidance=wanted.guidance,
            length=self.length,
            references=references,
            frames=self.frames,
        )[0]
        shown = sample.to_pil(pixels) if self.family.axes == 2 else pixels.movedim(0, 1).float().cpu() * 2 - 1
        return Outcome(shown, (width, height), time.perf_counter() - started, self.fps)


def of_bundle(bundle: Path, *, trust_remote_code: bool = False) -> Half:
    """The half that draws with a bundle, as `sample` does.

    Raises:
        InputError: not a bundle. CheckFailed: it is unfinished. ResourceError: it draws videos, and PyAV is not
            installed.
    """
    family, manifest = loading.family_of(bundle), manifests.read(bundle)
    defaults = manifest["defaults"]
    if family.axes == 3:
        videos.require_reader()
    return Half(
        name=bundle.name,
        family=family,
        config=loading.transformer_config(bundle),
        vae=read_json(bundle / "vae" / "config.json"),
        length=defaults["text_length"],
        opened=lambda: loading.load(bundle, trust_remote_code=trust_remote_code)[0],
        fit=lambda size: size,
        frames=defaults.get("frames", 1),
        fps=manifests.fps_of(manifest, family),
    )


def of_base(bundle: Path, against: str | None, home: Path, console: Console) -> tuple[Half | None, str]:
    """(the half that draws with the base, why there is none). Nothing is fetched.

    Args:
        against: the base: catalogue name, folder, file or hub id. None: the one that the manifest names, if it is on
            this machine and is what the bundle was made from, file by file.
        home: folder for a base that must be written as a pipeline first.

    Raises:
        InputError, AccessError: ``against`` cannot be used, or is not on this machine.
    """
    manifest = manifests.read(bundle)
    source: Source | None
    if against is None:
        console.say("serve: looking for the base that the bundle was made from, and comparing its files")
        source, _, why = painter.named_base(manifest, home)
        if source is None:
            return None, why
    else:
        named = Identity(against, offline=True)
        require_source(named)
        folder = painter.import_folder(home, named.where)
        moving = "frames" in manifest["defaults"]
        source = painter.opened(against, named.where, named.revision, folder, offline=True, moving=moving)
    defaults, family = manifest["defaults"], source.family
    if family.axes != loading.family_of(bundle).axes:
        raise InputError(f"{source.name} is a {family.name} model, and {bundle} draws videos", "name its base")
    identity = Identity(source.name, offline=True)
    grid = painter.grid_of(bundle, loading.family_of(bundle))
    half = Half(
        name=source.name,
        family=family,
        config=source.config,
        vae=read_json(source.vae / "config.json"),
        length=defaults["text_length"] if family.name == manifest["family"] else family.text_length,
        opened=lambda: _base_pipeline(source, console),
        fit=lambda size: size_of_base(size, identity, grid),
        frames=defaults.get("frames", 1),
        fps=family.frames_per_second(source.index),
    )
    return half, ""


def _base_pipeline(source: Source, console: Console) -> Pipeline:
    if isinstance(source, Imported) and not (source.root / "model_index.json").exists():  # written last
        source.root.parent.mkdir(parents=True, exist_ok=True)
        source.lay_out(console)
    dtype = loading.default_dtype(source.root, pipelines.device())
    return source_pipeline.load(source, dtype)


def size_of_base(size: Size, base: Identity, converted: Grid) -> Size:
    """The size in px at which the base draws what is drawn at ``size``: the same, if it was trained on as many pixels.

    Else both sides are smaller by the factor of `own_side`, and whole tokens of both models.
    """
    most, longest = base.most_pixels, max(size)
    if most is None or math.prod(size) <= most:
        return size
    own, step = own_side(base, converted, longest), math.lcm(base.grid.token_px, converted.token_px)
    width, height = (max(step, side * own // longest // step * step) for side in size)
    return width, height


def sizes(half: Half, manifest: Mapping[str, Any]) -> list[Size]:
    """Sizes that a bundle was trained for, its own first: other shapes of about its area, and half its sides.

    Args:
        manifest: of the bundle.
    """
    own = manifest["defaults"]["width"], manifest["defaults"]["height"]
    cell = sample.token_side(half.family, half.config, half.vae)
    area = math.sqrt(math.prod(own))
    found = {own: None}
    for scale in SCALES:
        for across, down in SHAPES if half.family.any_shape else SHAPES[:1]:
            stretch = math.sqrt(across / down)
            width, height = (int(side * scale / cell + 1e-6) * cell for side in (area * stretch, area / stretch))
            if _fits(half, manifest, (width, height)):
                found[width, height] = None
    return list(found)


def _fits(half: Half, manifest: Mapping[str, Any], size: Size) -> bool:
    """Whether the model can draw pictures of this size, and was trained for it."""
    width, height = size
    try:
        sample.check_size(half.family, half.config, half.vae, height, width)
    except InputError:
        return False
    return not sample.beyond_training(manifest, half.family, half.config, height, width)
