"""A source of the catalogue with random weights: a whole pipeline folder of the published classes and sizes.

Nothing is downloaded. The pipeline loads and draws as the published one does, in the same time and memory; what it
draws means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcgen_convert.checkpoint import shards
from dcgen_convert.checkpoint.stream import Item
from dcgen_convert.core.console import NULL, Console
from dcgen_convert.core.files import atomic_write, fresh_folder, once, write_json
from dcgen_convert.core.version import __version__
from dcgen_convert.families import components
from dcgen_convert.families.catalog import AutoencoderEntry, SourceEntry
from dcgen_convert.families.components import TRANSFORMERS, Component, Layout
from dcgen_convert.networks import folder as folders
from dcgen_convert.networks import random_weights, synthetic_tokenizers

SHARD_BYTES = 2 * 1000**3
STEMS = {TRANSFORMERS: "model"}  # of weight files
DTYPES = {"BF16": "bfloat16", "F32": "float32"}
CARD = """# Random weights

This folder has the classes and the sizes of {name}, and random weights (seed {seed}). It is for rehearsals: it shows
what a conversion costs, and its pictures are noise.
"""


def write(entry: SourceEntry, folder: Path, seed: int = 0, console: Console = NULL) -> Path:
    """Write the pipeline of a catalogue source with random weights; a finished one is kept. Returns ``folder``.

    At most one shard of 2 GB is open and one tensor is made at a time. The same seed gives the same bytes.

    Raises:
        InputError: the package lacks the configs of its components; the hint names the sources that can be had.
    """
    return write_layout(components.layout_of(entry), entry.name, folder, seed, console)


def write_autoencoder(entry: AutoencoderEntry, folder: Path, seed: int = 0, console: Console = NULL) -> Path:
    """Write a published deep-compression autoencoder with random weights; a finished one is kept. Returns ``folder``.

    Its config has the published scaling factor. The latents of random weights have another scale: a conversion with
    them must set `latents.scale_override`.

    Raises:
        InputError: its config is not known; the hint names the autoencoders that can be had.
    """
    part = components.autoencoder_of(entry)

    def fill(target: Path) -> None:
        items = _items("autoencoder", part, random_weights.pool(seed))
        with console.progress(f"random weights of {entry.alias}", _size(items), "B") as bar:
            _write_part(part, items, fresh_folder(target), bar.advance)
        _write_card(target, entry.alias, seed)

    return once(folder, _made_of(entry.alias, seed, asdict(part)), fill)


def write_layout(layout: Layout, name: str, folder: Path, seed: int, console: Console = NULL) -> Path:
    """As `write`, for a layout that is at hand; the tests shrink one."""

    def fill(target: Path) -> None:
        numbers = random_weights.pool(seed)
        items = {key: _items(key, part, numbers) for key, part in layout.parts.items()}
        fresh_folder(target)
        with console.progress(f"random weights of {name}", sum(map(_size, items.values())), "B") as bar:
            for key, part in layout.parts.items():
                (target / key).mkdir()
                _write_part(part, items[key], target / key, bar.advance)
        _write_card(target, name, seed)
        write_json(target / "model_index.json", index_of(layout))

    return once(folder, _made_of(name, seed, asdict(layout)), fill)


def model_of(part: Component) -> nn.Module:
    """The network of a part on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return network_of(part)


def network_of(part: Component) -> nn.Module:
    """The network of a part, as its class makes it."""
    import transformers

    if part.library != TRANSFORMERS:
        network: nn.Module = folders.class_called(part.kind).from_config(part.config)
        return network
    cls = getattr(transformers, part.kind)
    encoder: nn.Module = cls(cls.config_class(**part.config))
    return encoder


def write_rest(layout: Layout, folder: Path) -> None:
    """Write what a pipeline has beside its networks: tokenizers, scheduler, and the index of all."""
    for key, part in layout.parts.items():
        if part.dtype is None:
            (folder / key).mkdir()
            _write_part(part, {}, folder / key, lambda _: None)
    write_json(folder / "model_index.json", index_of(layout))


def _items(name: str, part: Component, numbers: Tensor) -> dict[str, Item]:
    """The tensors of a part; none for a tokenizer or a scheduler."""
    return {} if part.dtype is None else random_weights.items(model_of(part), part.dtype, name, numbers)


def _size(items: Mapping[str, Item]) -> int:
    return sum(item.size for item in items.values())


def _write_part(part: Component, items: Mapping[str, Item], folder: Path, advance: Callable[[int], object]) -> None:
    if part.kind in synthetic_tokenizers.BUILDERS:
        synthetic_tokenizers.write(part.kind, folder=folder, **part.config)
    elif part.dtype is None:
        write_json(folder / "scheduler_config.json", part.config)
    else:
        shards.write_folder(folder, items, STEMS.get(part.library, shards.STEM), SHARD_BYTES, advance)
        stated = {"dtype": DTYPES[part.dtype]} if part.library == TRANSFORMERS else {}
        write_json(folder / "config.json", {**part.config, **stated})


def index_of(layout: Layout) -> dict[str, Any]:
    """model_index.json."""
    import diffusers

    named = {key: [part.library, part.kind] for key, part in layout.parts.items()}
    return {"_class_name": layout.pipeline, "_diffusers_version": diffusers.__version__, **named, **layout.index}


def _write_card(folder: Path, name: str, seed: int) -> None:
    atomic_write(folder / "README.md", CARD.format(name=name, seed=seed))


def _made_of(name: str, seed: int, layout: dict[str, Any]) -> dict[str, Any]:
    return {"random": name, "seed": seed, "version": __version__, "layout": layout}
