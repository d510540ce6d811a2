"""The pipelines that a benchmark compares: the base and its conversion, from a bundle, a source, or configs alone.

Where there is no bundle, the converted pipeline is made as surgery makes it: the base's own weights, and random ones
for the embedder, the head and the autoencoder, which are new. How long a network takes does not depend on the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from dcgen_convert.bundle import loading
from dcgen_convert.bundle.autoencoder_dc_adapter import AutoencoderDCAdapter
from dcgen_convert.bundle.layout import adapter_config, has_adapter
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.data import buckets
from dcgen_convert.data.buckets import Size
from dcgen_convert.families import Family, catalog, components, deep_autoencoders
from dcgen_convert.families.base import Network, Pipeline
from dcgen_convert.families.components import DIFFUSERS, Component
from dcgen_convert.families.grid import Grid, autoencoder_grid, autoencoder_time
from dcgen_convert.networks import at_once, autoencoder_files, pipelines, random_networks, random_weights
from dcgen_convert.networks.folder import bundled
from dcgen_convert.networks.pipelines import quiet_diffusers
from dcgen_convert.recipe.identity import Identity
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.recipe.videos import frames_of
from dcgen_convert.stages import source_pipeline
from dcgen_convert.stages.job import DEEP

BASE, CONVERTED = "base", "converted"
SEED = 0  # of random weights


@dataclass(frozen=True)
class Model:
    """One pipeline of the comparison.

    grid: its latent space. runtime: as `bundle.loading.load` tells it.
    """

    pipeline: Pipeline
    family: Family
    runtime: str = "stock"

    @property
    def network(self) -> Network:
        return getattr(self.pipeline, self.family.component)

    @property
    def networks(self) -> list[nn.Module]:
        """All networks that it draws with: some models have one for each part of the noise levels, of one size."""
        return pipelines.networks_of(self.family, self.pipeline)

    @property
    def configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the network and of the autoencoder, each with the name of its class."""
        network, vae = self.network, self.pipeline.vae
        return (
            {"_class_name": type(network).__name__, **network.config},
            {"_class_name": type(vae).__name__, **vae.config},
        )

    @property
    def grid(self) -> Grid:
        config, vae = self.configs
        f, c = autoencoder_grid(vae)
        return Grid(f, c, self.family.patch(config, c), autoencoder_time(vae))

    def tokens(self, height: int, width: int | None = None, frames: int = 1) -> int:
        """Image tokens that the network sees while it draws a picture or a video of this size, in px: its own, and
        those of references that have some.
        """
        own, grid = 1 if self.family.reference_channels else 1 + self.family.fewest_references, self.grid
        return grid.time.latents(frames) * grid.tokens(height, width) * own

    @property
    def encoders(self) -> list[nn.Module]:
        """What encodes prompts, and all else of the pipeline but what it draws and decodes with."""
        others = (*self.networks, self.pipeline.vae)
        parts = self.pipeline.components.values()
        return [part for part in parts if isinstance(part, nn.Module) and all(part is not other for other in others)]


@dataclass(frozen=True)
class ModelPair:
    """What is compared: the base, its conversion, and where its kernels run the 4-bit form of that, by name.

    Attributes:
        source: name of the base. identity: what it is.
        steps, guidance, length: how a picture is drawn; length in text tokens.
        side: of a picture in px, unless told otherwise. own: of videos the (height, width) in px that belongs to it.
        frames: of each video; 1: they draw pictures.
        notes: what a reader of the figures must know.
    """

    models: dict[str, Model]
    identity: Identity
    steps: int
    guidance: float
    length: int
    side: int
    notes: list[str] = field(default_factory=list)
    own: Size | None = None
    frames: int = 1

    @property
    def family(self) -> Family:
        return self.models[BASE].family

    def size_of(self, side: int) -> Size:
        """(height, width) in px of what is drawn at ``side``: a square; a video of its family's shape and that area.

        Raises:
            InputError: no video is as small.
        """
        if self.own and side == self.side:
            return self.own
        if self.family.axes == 2:
            return side, side
        step = math.lcm(*(model.grid.token_px for model in self.models.values()))
        if side < step:
            raise InputError(f"{side} px are smaller than a token of {step} px", f"use {step} px or more")
        height, width = self.family.shape
        return buckets.nearest(buckets.sizes(side // step * step, step), width, height)


def of_bundle(
    bundle: Path, manifest: Mapping[str, Any], base: Identity, revision: str | None, dtype: torch.dtype
) -> ModelPair:
    """The pair of a bundle and the pipeline that it was made from, loaded on the CPU.

    Raises:
        InputError, AccessError: the base is no pipeline folder, or cannot be had.
    """
    models = {BASE: _loaded_base(base, revision, dtype)}
    family, notes = models[BASE].family, []
    if family.name != loading.family_of(bundle).name:
        raise InputError(
            f"{base.name} is a {family.name} model, and {bundle} holds a {loading.family_of(bundle).name}",
            "name the model that the bundle was made from: --against SOURCE",
        )
    format = next((name for name in loading.formats_of_bundle(bundle).values() if name != "awq"), None)
    reason = "" if format is None else loading.why_no_kernels(bundle, dtype)
    if format is None or reason or manifest["layout"] != "source":  # else the 16-bit model is the base itself
        models[CONVERTED] = _loaded_bundle(bundle, models[BASE], dtype, "auto" if format is None else "dequantised")
    if format is not None and reason:
        notes.append(
            f"{format} was not timed, because its kernels do not run here: {reason}; the converted model has "
            "dequantised weights"
        )
    elif format is not None:
        models[format] = _loaded_bundle(bundle, models[BASE], dtype, "stock")
    how = manifest["defaults"]
    drawing = how["steps"], how["guidance"], how["text_length"]
    if family.axes == 2:
        return ModelPair(models, base, *drawing, how["height"], notes)
    own = how["height"], how["width"]
    return ModelPair(models, base, *drawing, math.isqrt(math.prod(own)), notes, own, how["frames"])


def _loaded_base(base: Identity, revision: str | None, dtype: torch.dtype) -> Model:
    source = load_source(base.name, base.where, revision=revision or base.revision, offline=base.offline)
    if source.imported:
        raise InputError(
            f"{base.name} is no pipeline folder that loads as it is",
            "give a diffusers folder, a catalogue name or a hub id; or --random with a catalogue name",
        )
    return Model(source_pipeline.load(source, dtype).to("cpu"), source.family)


def _loaded_bundle(bundle: Path, base: Model, dtype: torch.dtype, runtime: str) -> Model:
    """The bundle's pipeline. It has copies of the base's text encoders: those of the base take their place."""
    pipeline, used = loading.load(bundle, dtype, runtime, None if runtime == "stock" else "cpu")
    model = Model(pipeline, base.family, used)
    for name, part in base.pipeline.components.items():
        if any(part is encoder for encoder in base.encoders) and name in pipeline.components:
            setattr(pipeline, name, part)
    return model


def of_source(resolved: Resolved, dtype: torch.dtype, side: int | None, random: bool) -> ModelPair:
    """The pair of a source and what its conversion will be, on the CPU.

    Args:
        side: of the largest picture, in px; None: the recipe's.
        random: take random weights for the base too, a catalogue name. Nothing is downloaded.

    Raises:
        InputError: ``random`` for a source whose configs are not known.
        ResourceError: the weights do not fit the memory of this machine.
    """
    recipe, identity = resolved.recipe, resolved.identity
    own, family = recipe.adapt.phases[-1].resolution, identity.family
    autoencoder = _autoencoder_config(recipe, identity)
    f, c = autoencoder_grid(autoencoder)
    numbers = random_weights.pool(SEED)
    base = _random_base(identity, autoencoder, dtype) if random else _loaded_base(identity, recipe.revision, dtype)
    config = family.convert_config(dict(base.network.config), f, c, side or own)
    part = Component(DIFFUSERS, family.model_class, config, "any")
    networks = {
        name: random_networks.network(part, dtype, CONVERTED, numbers, dict(own.named_parameters()))
        for name, own in zip(family.components, base.networks, strict=True)
    }
    vae = _autoencoder(family, autoencoder, config, dtype)
    pipeline = random_networks.with_parts(base.pipeline, **networks, vae=vae)
    pipeline.register_to_config(**family.index_of_bundle(pipeline.config))
    models = {BASE: base, CONVERTED: Model(pipeline, family)}
    length, time = recipe.latents.text_length or family.text_length, autoencoder_time(autoencoder)
    frames = time.shown(frames_of(recipe, family, time)) if family.axes == 3 else 1
    new = "the embedder, the head and the autoencoder of the converted model"
    notes = [f"random weights for {'all parts' if random else new}: the pictures mean nothing, the times do not change"]
    drawing = recipe.bundle.steps, recipe.bundle.guidance, length
    return ModelPair(models, identity, *drawing, own, notes, frames=frames)


def _random_base(identity: Identity, autoencoder: Mapping[str, Any], dtype: torch.dtype) -> Model:
    """The pipeline of a catalogue name with random weights; ResourceError, before any is made, if it does not fit."""
    if identity.entry is None:
        raise InputError(
            f"random weights can be made for the models of the catalogue, and {identity.name} is none of them",
            "dcgen-convert recipes list shows their names; or leave --random out",
        )
    layout = components.layout_of(identity.entry)
    parts = {**layout.parts, "new vae": Component(DIFFUSERS, autoencoder["_class_name"], dict(autoencoder), "any")}
    counts = {name: random_networks.parameters(part) for name, part in parts.items()}
    need, free = sum(counts.values()) * dtype.itemsize, at_once.free_bytes(torch.device("cpu"))
    if need > free:
        shown = ", ".join(f"{name} {count * dtype.itemsize / 1e9:.1f}" for name, count in counts.items() if count)
        half = " or use --dtype bf16," if dtype is torch.float32 else ""
        raise ResourceError(
            f"the weights of {identity.name} and its conversion need {need / 1e9:.1f} GB of memory ({shown}), and "
            f"{free / 1e9:.1f} GB are free",
            f"use a machine with more memory,{half} or benchmark a smaller model",
        )
    return Model(random_networks.pipeline(layout, dtype, random_weights.pool(SEED)), identity.family)


def _autoencoder_config(recipe: Recipe, identity: Identity) -> dict[str, Any]:
    """Config of the deep autoencoder that the recipe converts to. Its weights are not read."""
    entry, path, reader = catalog.find_autoencoder(recipe.ae), Path(recipe.ae).expanduser(), identity.reader
    if entry is not None and (entry.given or deep_autoencoders.kind_of(entry) is not None):
        config = deep_autoencoders.config_of(entry)
    elif autoencoder_files.is_file(recipe.ae):
        config = autoencoder_files.file_and_config(recipe.ae)[1]
    elif entry is not None or path.exists():
        folder = Path(entry.where) if entry else path
        config = reader.first(folder / "config.json", folder / "vae" / "config.json")
    else:
        config = reader.hub(recipe.ae, "config.json", identity.offline)
    channels = recipe.ae_channels or config["latent_channels"]
    known, name = DEEP[identity.family.axes], config.get("_class_name")
    return {**config, "_class_name": name if name in known else known[0], "latent_channels": channels}


def _autoencoder(family: Family, config: dict[str, Any], network: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The autoencoder as a bundle has it, with random weights."""
    from accelerate import init_empty_weights

    whole = {**config, "scaling_factor": config.get("scaling_factor") or 1.0}
    kind: Any = diffusers.AutoencoderDC if family.axes == 2 else bundled(config["_class_name"])
    if has_adapter(family):
        kind, whole = AutoencoderDCAdapter, whole | adapter_config(family, whole, network)
    extra = family.vae_config(whole)
    with init_empty_weights(include_buffers=False), quiet_diffusers():  # it warns of what is registered below
        model = kind.from_config({**whole, **extra})
    model.register_to_config(**{key: value for key, value in extra.items() if key not in model.config})
    return random_networks.filled(model, dtype, "new vae", random_weights.pool(SEED), {})
