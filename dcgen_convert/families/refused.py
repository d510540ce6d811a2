"""Models of diffusers that draw pictures or videos and cannot be converted, and why.

Read from the pipelines of diffusers 0.42. The documentation shows this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcgen_convert.core.errors import InputError


@dataclass(frozen=True)
class Refusal:
    """A model by its name, and the reason in the words that follow "NAME cannot be converted: "."""

    name: str
    why: str


# Class of the network or of the pipeline -> the refusal.
REFUSED: dict[str, Refusal] = {
    "BriaFiboTransformer2DModel": Refusal(
        "FIBO", "its pipeline takes 16 px for a latent cell, whatever the autoencoder says"
    ),
    "Flux3Transformer2DModel": Refusal(
        "FLUX.3",
        "only a modular pipeline draws with it, and sources and bundles are folders of DiffusionPipeline, with a "
        "model_index.json",
    ),
    "GlmImageTransformer2DModel": Refusal(
        "GLM-Image",
        "an autoregressive model writes a token for every 16 x 16 px first, which the network adds to the token of the "
        "latent there, and a coarser latent has no token there",
    ),
    "Ideogram4Transformer2DModel": Refusal(
        "Ideogram 4",
        "it draws with two networks, of which one never sees the prompt, and a conversion makes one network",
    ),
    "LongCatImageTransformer2DModel": Refusal(
        "LongCat-Image", "its pipeline draws 16 latent channels, whatever the network's config says"
    ),
    "PRXPixelPipeline": Refusal("PRX-Pixel", "it draws pixels and has no autoencoder"),
    "QwenImage21Transformer2DModel": Refusal(
        "Qwen-Image 2.1", "its pipeline takes 16 px for a token, whatever the autoencoder says"
    ),
}


def refusal_of(config: Mapping[str, Any], index: Mapping[str, Any] | None = None) -> Refusal | None:
    """The refusal of a network with this config, in a pipeline with this model_index.json; None: there is none."""
    known = (config.get("_class_name"), (index or {}).get("_class_name"))
    return next((REFUSED[name] for name in known if isinstance(name, str) and name in REFUSED), None)


def refuse(config: Mapping[str, Any], where: object, index: Mapping[str, Any] | None = None) -> None:
    """InputError for a model of the table; ``where`` is what the config was read from."""
    if found := refusal_of(config, index):
        raise InputError(
            f"{where} is a {found.name} model, which cannot be converted: {found.why}",
            "give another model; dcgen-convert recipes list shows some",
        )
