"""How many weights there are beside the transformer: as the catalogue says, else as the headers of files say."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.headers import Entry, read_header, read_weights
from dcgen_convert.checkpoint.source import resolve_folder
from dcgen_convert.core.errors import AccessError
from dcgen_convert.families import catalog
from dcgen_convert.networks import autoencoder_files
from dcgen_convert.recipe.identity import Identity

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Amount:
    """Number of the weights of a network, and bytes of them in a bundle; both 0 where nothing tells them."""

    parameters: int = 0
    bytes: int = 0


NONE = Amount()


def of_autoencoder(ae: str) -> Amount:
    """Of the autoencoder that a recipe converts to.

    Raises:
        InputError: its files are damaged.
    """
    entry = catalog.find_autoencoder(ae)
    if entry is not None:
        return Amount(entry.parameters, BF16 * entry.parameters)
    if autoencoder_files.is_file(ae):
        path, _ = autoencoder_files.file_and_config(ae)
        if path.suffix == autoencoder_files.SUFFIX:
            return _counted(read_header(path)[0].values())
        size = path.stat().st_size  # a pickle, which only a conversion opens: nearly all of it are float32 numbers
        return Amount(size // FP32, size)
    try:
        folder, _ = resolve_folder(ae, offline=True)
    except AccessError:
        return NONE
    return _in_folder(folder if (folder / "config.json").is_file() else folder / "vae")


def beside(source: Identity) -> int:
    """Parameters of the source's text encoders and autoencoder."""
    if source.entry:
        return source.entry.extra_parameters
    if source.path is None or source.index is None:
        return 0
    others = trust.components(source.index).keys() - {*source.family.components}
    return sum(_in_folder(source.path / name).parameters for name in others)


def _in_folder(folder: Path) -> Amount:
    held = any(folder.glob(f"*{autoencoder_files.SUFFIX}"))
    return _counted(read_weights(folder).values()) if held else NONE


def _counted(tensors: Collection[Entry]) -> Amount:
    return Amount(sum(math.prod(one.shape) for one in tensors), sum(one.end - one.start for one in tensors))
