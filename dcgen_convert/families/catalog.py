"""The names that users type for base models and autoencoders, and where each is found.

Facts only. The licences are those that the repositories declared when this table was written. The licence of a bundle
is read from its sources, never from here.
Legend: f spatial compression, c latent channels, p patch in latent cells.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = Path(__file__).resolve().parent / "configs"
WEIGHTS = (".safetensors", ".pt")  # names of autoencoders that are single files end so


@dataclass(frozen=True)
class SourceEntry:
    """A base model.

    Attributes:
        repo: hub id; None for a folder inside the package (`folder`).
        config: file of the transformer config in `families/configs/`, so that `plan` needs no network; None: the
            config is in `folder`.
        vae_factor, vae_channels, patch: f, c and p of the model's own latents.
        recipe: the shipped recipe that converts the model.
        trained_side: px per side of the largest pictures that it was trained on; None: its family says it.
        extra_parameters: parameters of the text encoders and the autoencoder. They are downloaded with the transformer.
    """

    name: str
    repo: str | None
    family: str
    licence: str
    gated: bool
    config: str | None
    vae_factor: int
    vae_channels: int
    patch: int
    recipe: str
    revision: str | None = None
    folder: Path | None = None
    extra_parameters: int = 0
    trained_side: int | None = None

    @property
    def where(self) -> str:
        """Folder or hub id."""
        return str(self.folder or self.repo)

    @property
    def config_path(self) -> Path:
        """File of the transformer's config: it ships with the package."""
        return CONFIGS / self.config if self.config else Path(self.where) / "transformer" / "config.json"

    def transformer_config(self) -> dict[str, Any]:
        """The transformer's config.json as a mapping."""
        return read_json(self.config_path)


@dataclass(frozen=True)
class AutoencoderEntry:
    """A deep-compression autoencoder.

    Attributes:
        scaling_factor: None: it is in config.json, or it is 1 / RMS of the latents.
        frames: frames of a video per latent frame; 1: it takes pictures.
        sha256: of the pickle that its weights are published as; None: the user states it.
    """

    alias: str
    repo: str | None
    factor: int
    channels: int
    scaling_factor: float | None
    parameters: int
    folder: Path | None = None
    frames: int = 1
    sha256: str | None = None

    @property
    def given(self) -> bool:
        """Whether its weights are never fetched, because they are published as a pickle: the user gives the file."""
        return self.frames > 1 and self.folder is None

    @property
    def where(self) -> str:
        """Folder or hub id; the alias of one that is `given`."""
        return self.alias if self.given else str(self.folder or self.repo)


def _tiny(name: str) -> Path:
    return PACKAGE / "tiny" / "weights" / name


_BFL = "flux-1-dev-non-commercial-license"
# FLUX: T5-XXL encoder 4,762,310,656 + CLIP-L 123,060,480 + AutoencoderKL 83,819,683. SANA: Gemma-2-2B 2,614,341,888 +
# DC-AE 312,250,275. DiT: the VAE of Stable Diffusion 83,653,863.
_FLUX_EXTRA, _SANA_EXTRA, _DIT_EXTRA = 4_969_190_819, 2_926_592_163, 83_653_863
_QWEN_EXTRA = 8_419_059_187  # Qwen2.5-VL-7B 8,292,166,656 + AutoencoderKLQwenImage 126,892,531
_WAN_EXTRA = 5_680_910_336 + 126_892_531  # UMT5-XXL + AutoencoderKLWan
_WAN22_EXTRA = 5_680_910_336 + 704_688_668  # UMT5-XXL + AutoencoderKLWan of Wan 2.2
_SANA_VIDEO_EXTRA = 2_614_341_888 + 126_892_531  # Gemma-2-2B + AutoencoderKLWan
_SD_EXTRA = 123_060_480 + _DIT_EXTRA

SOURCES: dict[str, SourceEntry] = {
    entry.name: entry
    for entry in (
        SourceEntry(
            name="flux-krea",
            repo="black-forest-labs/FLUX.1-Krea-dev",
            family="flux",
            licence=_BFL,
            gated=True,
            config="flux-dev.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="flux-krea",
            extra_parameters=_FLUX_EXTRA,
        ),
        SourceEntry(
            name="flux-kontext",
            repo="black-forest-labs/FLUX.1-Kontext-dev",
            family="flux-kontext",
            licence=_BFL,
            gated=True,
            config="flux-dev.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="flux-kontext",
            extra_parameters=_FLUX_EXTRA,
        ),
        SourceEntry(
            name="qwen-image-edit",
            repo="Qwen/Qwen-Image-Edit",
            family="qwenimage-edit",
            licence="apache-2.0",
            gated=False,
            config="qwenimage.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="qwen-image-edit",
            extra_parameters=_QWEN_EXTRA,
        ),
        SourceEntry(
            name="qwen-image-edit-2511",
            repo="Qwen/Qwen-Image-Edit-2511",
            family="qwenimage-edit-plus",
            licence="apache-2.0",
            gated=False,
            config="qwenimage-edit-2511.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="qwen-image-edit",
            extra_parameters=_QWEN_EXTRA,
        ),
        SourceEntry(
            name="flux-dev",
            repo="black-forest-labs/FLUX.1-dev",
            family="flux",
            licence=_BFL,
            gated=True,
            config="flux-dev.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="flux-dev",
            extra_parameters=_FLUX_EXTRA,
        ),
        SourceEntry(
            name="flux-schnell",
            repo="black-forest-labs/FLUX.1-schnell",
            family="flux",
            licence="apache-2.0",
            gated=True,
            config="flux-schnell.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="flux-schnell",
            extra_parameters=_FLUX_EXTRA,
        ),
        SourceEntry(
            name="sana-1.6b",
            repo="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
            family="sana",
            licence="see the repository",
            gated=False,
            config="sana-1.6b.json",
            vae_factor=32,
            vae_channels=32,
            patch=1,
            recipe="sana-1.6b",
            extra_parameters=_SANA_EXTRA,
        ),
        SourceEntry(
            name="sana-sprint-1.6b",
            repo="Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
            family="sana-sprint",
            licence="see the repository",
            gated=False,
            config="sana-sprint-1.6b.json",
            vae_factor=32,
            vae_channels=32,
            patch=1,
            recipe="sana-sprint-1.6b",
            extra_parameters=_SANA_EXTRA,
        ),
        SourceEntry(
            name="sd-1.5",
            repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
            family="unet",
            licence="creativeml-openrail-m",
            gated=False,
            config="sd-1.5.json",
            vae_factor=8,
            vae_channels=4,
            patch=1,
            recipe="sd-1.5",
            extra_parameters=_SD_EXTRA,
        ),
        SourceEntry(
            name="dit-xl-256",
            repo="facebook/DiT-XL-2-256",
            family="dit",
            licence="cc-by-nc-4.0",
            gated=False,
            config="dit-xl-256.json",
            vae_factor=8,
            vae_channels=4,
            patch=2,
            recipe="dit-xl-256",
            extra_parameters=_DIT_EXTRA,
        ),
        SourceEntry(
            name="dit-xl-512",
            repo="facebook/DiT-XL-2-512",
            family="dit",
            licence="cc-by-nc-4.0",
            gated=False,
            config="dit-xl-512.json",
            vae_factor=8,
            vae_channels=4,
            patch=2,
            recipe="dit-xl-512",
            extra_parameters=_DIT_EXTRA,
        ),
        SourceEntry(
            name="wan-1.3b",
            repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            family="wan",
            licence="apache-2.0",
            gated=False,
            config="wan-1.3b.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="wan-1.3b-480p",
            extra_parameters=_WAN_EXTRA,
            trained_side=640,
        ),
        SourceEntry(
            name="wan-14b",
            repo="Wan-AI/Wan2.1-T2V-14B-Diffusers",
            family="wan",
            licence="apache-2.0",
            gated=False,
            config="wan-14b.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="wan-14b-704p",
            extra_parameters=_WAN_EXTRA,
            trained_side=960,
        ),
        SourceEntry(
            name="wan-2.2-5b",
            repo="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            family="wan",
            licence="apache-2.0",
            gated=False,
            config="wan-2.2-5b.json",
            vae_factor=16,
            vae_channels=48,
            patch=2,
            recipe="wan-2.2-5b-704p",
            extra_parameters=_WAN22_EXTRA,
            trained_side=960,
        ),
        SourceEntry(
            name="wan-2.2-a14b",
            repo="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            family="wan-a14b",
            licence="apache-2.0",
            gated=False,
            config="wan-14b.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="wan-2.2-a14b-480p",
            extra_parameters=_WAN_EXTRA,
            trained_side=960,
        ),
        SourceEntry(
            name="wan-2.2-i2v-a14b",
            repo="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            family="wan-image-a14b",
            licence="apache-2.0",
            gated=False,
            config="wan-2.2-i2v-a14b.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="wan-2.2-i2v-a14b-480p",
            extra_parameters=_WAN_EXTRA,
            trained_side=960,
        ),
        SourceEntry(
            name="sana-video-2b",
            repo="Efficient-Large-Model/SANA-Video_2B_480p_diffusers",
            family="sana-video",
            licence="see the repository",
            gated=False,
            config="sana-video-2b.json",
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="sana-video-480p",
            extra_parameters=_SANA_VIDEO_EXTRA,
            trained_side=640,
        ),
        SourceEntry(
            name="tiny-flux",
            repo=None,
            family="flux",
            licence="apache-2.0",
            gated=False,
            config=None,
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="tiny-flux",
            folder=_tiny("tiny-flux"),
            trained_side=128,
        ),
        SourceEntry(
            name="tiny-kontext",
            repo=None,
            family="flux-kontext",
            licence="apache-2.0",
            gated=False,
            config=None,
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="tiny-kontext",
            folder=_tiny("tiny-kontext"),
            trained_side=128,
        ),
        SourceEntry(
            name="tiny-sana",
            repo=None,
            family="sana",
            licence="apache-2.0",
            gated=False,
            config=None,
            vae_factor=32,
            vae_channels=32,
            patch=1,
            recipe="tiny-sana",
            folder=_tiny("tiny-sana"),
        ),
        SourceEntry(
            name="tiny-dit",
            repo=None,
            family="dit",
            licence="apache-2.0",
            gated=False,
            config=None,
            vae_factor=8,
            vae_channels=4,
            patch=2,
            recipe="tiny-dit",
            folder=_tiny("tiny-dit"),
        ),
        SourceEntry(
            name="tiny-wan",
            repo=None,
            family="wan",
            licence="apache-2.0",
            gated=False,
            config=None,
            vae_factor=8,
            vae_channels=16,
            patch=2,
            recipe="tiny-wan",
            folder=_tiny("tiny-wan"),
            trained_side=128,
        ),
    )
}

_MIT, _DCAI = "mit-han-lab/dc-ae-{}-diffusers", "dc-ai/dc-ae-{}-diffusers"
_VIDEO = "dc-ai/dc-ae-v-1.0-f32t4c32"  # the others are not on the hub

AUTOENCODERS: dict[str, AutoencoderEntry] = {
    entry.alias: entry
    for entry in (  # alias, hub id, factor, channels, scaling factor, parameters
        AutoencoderEntry("dc-ae-f32", _MIT.format("f32c32-in-1.0"), 32, 32, 0.3189, 323_000_000),
        AutoencoderEntry("dc-ae-f32-in", _MIT.format("f32c32-in-1.0"), 32, 32, 0.3189, 323_000_000),
        AutoencoderEntry("dc-ae-f32-mix", _MIT.format("f32c32-mix-1.0"), 32, 32, 0.4552, 323_000_000),
        AutoencoderEntry("dc-ae-f32-sana", _MIT.format("f32c32-sana-1.0"), 32, 32, 0.41407, 312_000_000),
        AutoencoderEntry("dc-ae-f32-sana-1.1", _MIT.format("f32c32-sana-1.1"), 32, 32, 0.41407, 312_000_000),
        AutoencoderEntry("dc-ae-lite", _DCAI.format("lite-f32c32"), 32, 32, 0.41407, 421_000_000),
        AutoencoderEntry("dc-ae-f64", _DCAI.format("1.5-f64c128"), 64, 128, 0.5935, 715_000_000),
        AutoencoderEntry("dc-ae-f64-in", _MIT.format("f64c128-in-1.0"), 64, 128, 0.2889, 677_000_000),
        AutoencoderEntry("dc-ae-f64-mix", _MIT.format("f64c128-mix-1.0"), 64, 128, 0.4538, 677_000_000),
        AutoencoderEntry("dc-ae-f128", _MIT.format("f128c512-in-1.0"), 128, 512, 0.4883, 1_121_000_000),
        AutoencoderEntry("dc-ae-f128-in", _MIT.format("f128c512-in-1.0"), 128, 512, 0.4883, 1_121_000_000),
        AutoencoderEntry("dc-ae-f128-mix", _MIT.format("f128c512-mix-1.0"), 128, 512, 0.3620, 1_121_000_000),
        AutoencoderEntry("dc-ae-1.5-f32", _DCAI.format("1.5-f32c128"), 32, 128, None, 524_000_000),
        AutoencoderEntry("dc-ae-1.5-f64", _DCAI.format("1.5-f64c128"), 64, 128, 0.5935, 715_000_000),
        AutoencoderEntry("dc-ae-v-f32t4c32", _VIDEO, 32, 32, 0.7241, 2_139_000_000, frames=4),
        AutoencoderEntry("dc-ae-v-f32t4c64", None, 32, 64, 0.7614, 2_140_000_000, frames=4),
        AutoencoderEntry("dc-ae-v-f32t4c128", None, 32, 128, 0.4457, 2_144_000_000, frames=4),
        AutoencoderEntry("dc-ae-v-f32t4c256", None, 32, 256, 0.4752, 2_151_000_000, frames=4),
        AutoencoderEntry("dc-ae-v-f64t4c128", None, 64, 128, 0.4752, 2_717_000_000, frames=4),
        AutoencoderEntry("tiny-dc-ae-f32", None, 32, 32, None, 3_819_188, folder=_tiny("tiny-dc-ae-f32")),
        AutoencoderEntry("tiny-dc-ae-f64", None, 64, 128, None, 3_929_268, folder=_tiny("tiny-dc-ae-f64")),
        AutoencoderEntry("tiny-dc-ae-v", None, 32, 32, None, 2_575_508, folder=_tiny("tiny-dc-ae-v"), frames=4),
    )
}


def find_source(name: str) -> SourceEntry | None:
    """The entry with this name or this hub id; None when there is none."""
    return SOURCES.get(name) or next((entry for entry in SOURCES.values() if entry.repo and entry.repo == name), None)


def find_autoencoder(name: str) -> AutoencoderEntry | None:
    """The entry with this alias or this hub id; None for an existing folder or another hub id.

    Raises:
        InputError: a single word that is not an alias. The message names the most similar alias.
    """
    entry = AUTOENCODERS.get(name) or next(
        (entry for entry in AUTOENCODERS.values() if entry.repo and entry.repo == name), None
    )
    is_file = any(suffix in name for suffix in WEIGHTS)
    if entry is None and "/" not in name and not is_file and not Path(name).exists():
        hits = difflib.get_close_matches(name, AUTOENCODERS, n=1, cutoff=0.3)
        hint = f"; did you mean {hits[0]!r}?" if hits else ""
        raise InputError(
            f"unknown autoencoder {name!r}{hint}",
            f"known: {', '.join(AUTOENCODERS)}; or a folder; or ORG/NAME on the hub",
        )
    return entry
