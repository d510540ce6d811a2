"""The published pipelines. They complete a file that holds only a transformer.

A pipeline gives the text encoders, the autoencoder, the scheduler and a template of the config. This module holds
facts only; `checkpoint.source` fetches the parts when a conversion needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dcgen_convert.core.files import read_json
from dcgen_convert.families.catalog import CONFIGS


@dataclass(frozen=True)
class Base:
    """The published pipeline of one kind of transformer.

    Attributes:
        repo: hub id.
        template: file of its transformer config in `families/configs/`.
        factor, channels: f and c of its autoencoder.
        when: config values by which this kind differs from the others of its family.
    """

    family: str
    repo: str
    template: str
    factor: int
    channels: int
    when: Mapping[str, object] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        return read_json(CONFIGS / self.template)


# family, hub id, template, factor, channels, when. The first one that fits is used.
BASES = (
    Base("flux", "black-forest-labs/FLUX.1-schnell", "flux-schnell.json", 8, 16, {"guidance_embeds": False}),
    Base("flux", "black-forest-labs/FLUX.1-dev", "flux-dev.json", 8, 16),
    Base("flux-kontext", "black-forest-labs/FLUX.1-Kontext-dev", "flux-dev.json", 8, 16),
    Base("flux2", "black-forest-labs/FLUX.2-dev", "flux2-dev.json", 8, 32, {"guidance_embeds": True}),
    Base("chroma", "lodestones/Chroma1-HD", "chroma.json", 8, 16),
    Base("sd3", "stabilityai/stable-diffusion-3.5-large", "sd3.json", 8, 16, {"num_layers": 38}),
    Base("sd3", "stabilityai/stable-diffusion-3.5-medium", "sd3.json", 8, 16, {"qk_norm": "rms_norm"}),
    Base("sd3", "stabilityai/stable-diffusion-3-medium-diffusers", "sd3.json", 8, 16),
    Base(
        "sana",
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        "sana-1.6b.json",
        32,
        32,
        {"qk_norm": "rms_norm_across_heads"},
    ),
    Base("sana", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", "sana-1.6b.json", 32, 32),
    Base("sana-sprint", "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", "sana-sprint-1.6b.json", 32, 32),
    Base("lumina2", "Alpha-VLLM/Lumina-Image-2.0", "lumina2.json", 8, 16),
    Base("zimage", "Tongyi-MAI/Z-Image", "zimage.json", 8, 16),
    Base("qwenimage", "Qwen/Qwen-Image", "qwenimage.json", 8, 16),
    Base("qwenimage-edit", "Qwen/Qwen-Image-Edit", "qwenimage.json", 8, 16),
    Base("qwenimage-edit-plus", "Qwen/Qwen-Image-Edit-2511", "qwenimage-edit-2511.json", 8, 16),
    Base("auraflow", "fal/AuraFlow-v0.3", "auraflow.json", 8, 4),
    Base("unet", "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd-1.5.json", 8, 4),
    Base("krea2", "krea/Krea-2-Raw", "krea2.json", 8, 16),
)


def base_of(family: str, config: Mapping[str, object]) -> Base | None:
    """The published pipeline for a transformer with ``config``; None when several could be meant.

    FLUX.2 klein is such a case: it has two sizes, and each exists plain and distilled.
    """
    fits = (
        base
        for base in BASES
        if base.family == family and all(config.get(key) == value for key, value in base.when.items())
    )
    return next(fits, None)


def template_of(family: str) -> dict[str, Any]:
    """Config of a family's published model, for values that tensor shapes do not tell; empty when none ships."""
    return next((base.config() for base in BASES if base.family == family), {})
