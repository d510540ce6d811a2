"""What the pipeline folder of each source in the catalogue is made of, as its hub repository has it.

Facts only: the classes and their configs, which lie in `families/configs/parts/`. From them alone a pipeline of the
same classes and sizes can be written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dcgen_convert import families
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import read_json
from dcgen_convert.families import catalog, deep_autoencoders
from dcgen_convert.families.catalog import AutoencoderEntry, SourceEntry

PARTS = catalog.CONFIGS / "parts"
BF16, F32 = "BF16", "F32"  # safetensors' names
DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"
SANA_AUTOENCODER = "dc-ae-f32-sana"
CLASSES = 1000  # of DiT-XL: those of ImageNet


@dataclass(frozen=True)
class Component:
    """One folder of a pipeline.

    Attributes:
        library, kind: the class that loads it. AutoencoderDCVideo, which is this program's, counts as diffusers'.
        config: its config.json; of a tokenizer {"size": entries of its vocabulary, "model_max_length": tokens}, as of a
            processor, which has a tokenizer.
        dtype: of its weights; None: it has none.
    """

    library: str
    kind: str
    config: dict[str, Any]
    dtype: str | None = None


@dataclass(frozen=True)
class Layout:
    """A whole pipeline: the folders by name, and what else stands in its model_index.json."""

    pipeline: str
    parts: dict[str, Component]
    index: dict[str, Any] = field(default_factory=dict)


def layout_of(entry: SourceEntry) -> Layout:
    """What the pipeline of a catalogue source is made of.

    Raises:
        InputError: the package does not have the configs of all its components.
    """
    if entry.name not in _BESIDE:
        raise InputError(
            f"{entry.name} cannot be written with random weights: this program lacks the configs of its components",
            f"these can: {', '.join(_BESIDE)}",
        )
    family = families.get(entry.family)
    network = Component(DIFFUSERS, family.model_class, entry.transformer_config(), BF16)
    networks = dict.fromkeys(family.components, network)
    return Layout(family.pipeline_class, {**networks, **_BESIDE[entry.name]()}, _INDEX.get(entry.name, {}))


def index_of(entry: SourceEntry) -> dict[str, Any]:
    """What model_index.json of a catalogue source says of its pipeline and its networks."""
    family = families.get(entry.family)
    networks = {name: [DIFFUSERS, family.model_class] for name in family.components}
    return {"_class_name": family.pipeline_class, **networks, **_INDEX.get(entry.name, {})}


def autoencoder_of(entry: AutoencoderEntry) -> Component:
    """A deep-compression autoencoder of the catalogue; InputError for one that is embedded in the package."""
    if deep_autoencoders.kind_of(entry) is None and not entry.given:
        known = [
            known.alias for known in catalog.AUTOENCODERS.values() if deep_autoencoders.kind_of(known) or known.given
        ]
        raise InputError(
            f"{entry.alias} cannot be written with random weights: this program lacks its config",
            f"these can: {', '.join(known)}",
        )
    config = deep_autoencoders.config_of(entry)
    return Component(DIFFUSERS, config["_class_name"], config, F32)


def _config(name: str) -> dict[str, Any]:
    return dict(read_json(PARTS / f"{name}.json"))


def _scheduler(name: str) -> Component:
    config = _config(name)
    return Component(DIFFUSERS, config["_class_name"], config)


def _kl(name: str, dtype: str, kind: str = "AutoencoderKL") -> Component:
    return Component(DIFFUSERS, kind, _config(name), dtype)


def _text(kind: str, name: str) -> Component:
    return Component(TRANSFORMERS, kind, _config(name), BF16)


def _tokenizer(kind: str, size: int, **options: int) -> Component:
    return Component(TRANSFORMERS, kind, {"size": size, **options})


def _clip() -> dict[str, Component]:
    return {
        "text_encoder": _text("CLIPTextModel", "clip-l"),
        "tokenizer": _tokenizer("CLIPTokenizer", 49408, model_max_length=77),
    }


def _flux(scheduler: str) -> dict[str, Component]:
    return {
        "scheduler": _scheduler(scheduler),
        "vae": _kl("kl-flux", BF16),
        **_clip(),
        "text_encoder_2": _text("T5EncoderModel", "t5-xxl"),
        "tokenizer_2": _tokenizer("T5Tokenizer", 32100, model_max_length=512),
    }


def _sana(scheduler: str, vae: Component | None = None) -> dict[str, Component]:
    return {
        "scheduler": _scheduler(scheduler),
        "vae": vae or autoencoder_of(catalog.AUTOENCODERS[SANA_AUTOENCODER]),
        "text_encoder": _text("Gemma2Model", "gemma-2-2b"),
        "tokenizer": _tokenizer("GemmaTokenizer", 256000),
    }


def _qwen_edit() -> dict[str, Component]:
    return {
        "scheduler": _scheduler("flow-qwenimage"),
        "vae": _kl("kl-qwenimage", BF16, "AutoencoderKLQwenImage"),
        "text_encoder": _text("Qwen2_5_VLForConditionalGeneration", "qwen2.5-vl-7b"),
        "tokenizer": _tokenizer("Qwen2Tokenizer", 151665, model_max_length=131072),
        "processor": _tokenizer("Qwen2VLProcessor", 151665, model_max_length=131072),
    }


def _wan(version: str = "wan") -> dict[str, Component]:
    return {
        "scheduler": _scheduler(f"unipc-{version}"),
        "vae": _kl(f"kl-{version}", F32, "AutoencoderKLWan"),
        "text_encoder": _text("UMT5EncoderModel", "umt5-xxl"),
        "tokenizer": _tokenizer("T5Tokenizer", 256300, model_max_length=512),
    }


def _dit() -> dict[str, Component]:
    return {"scheduler": _scheduler("ddim-dit"), "vae": _kl("kl-sd", F32)}


_BESIDE = {  # source -> what stands beside its network
    "flux-krea": lambda: _flux("flow-flux-dev"),
    "flux-dev": lambda: _flux("flow-flux-dev"),
    "flux-kontext": lambda: _flux("flow-flux-dev"),
    "qwen-image-edit": _qwen_edit,
    "qwen-image-edit-2511": _qwen_edit,
    "flux-schnell": lambda: _flux("flow-flux-schnell"),
    "sana-1.6b": lambda: _sana("dpm-sana"),
    "sana-sprint-1.6b": lambda: _sana("scm-sana-sprint"),
    "sd-1.5": lambda: {"scheduler": _scheduler("pndm-sd-1.5"), "vae": _kl("kl-sd", F32), **_clip()},
    "wan-1.3b": _wan,
    "wan-14b": _wan,
    "wan-2.2-5b": lambda: _wan("wan-2.2"),
    "wan-2.2-a14b": lambda: {**_wan(), "scheduler": _scheduler("unipc-wan-2.2")},
    "wan-2.2-i2v-a14b": lambda: {**_wan(), "scheduler": _scheduler("unipc-wan-2.2")},
    "sana-video-2b": lambda: _sana("dpm-sana-video", _kl("kl-wan", F32, "AutoencoderKLWan")),
    "dit-xl-256": _dit,
    "dit-xl-512": _dit,
}
_LABELS = {"id2label": {str(number): f"class {number}" for number in range(CLASSES)}}
_NOTHING = [None, None]
_INDEX: dict[str, dict[str, Any]] = {
    "dit-xl-256": _LABELS,
    "dit-xl-512": _LABELS,
    "wan-2.2-a14b": {"boundary_ratio": 0.875},
    "wan-2.2-i2v-a14b": {"boundary_ratio": 0.9, "image_encoder": _NOTHING, "image_processor": _NOTHING},
    "wan-2.2-5b": {"transformer_2": _NOTHING, "boundary_ratio": None, "expand_timesteps": True},
    "sd-1.5": {"safety_checker": _NOTHING, "feature_extractor": _NOTHING, "requires_safety_checker": False},
}
