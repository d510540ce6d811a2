"""Families of diffusion models. Each family is one module of facts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.families import refused
from dcgen_convert.families.auraflow import AuraFlow
from dcgen_convert.families.base import Family, Text
from dcgen_convert.families.chroma import Chroma
from dcgen_convert.families.cogview4 import CogView4
from dcgen_convert.families.dit import DiT
from dcgen_convert.families.ernie_image import ErnieImage
from dcgen_convert.families.experts import Expert
from dcgen_convert.families.flux import Flux
from dcgen_convert.families.flux2 import Flux2
from dcgen_convert.families.flux_kontext import FluxKontext
from dcgen_convert.families.hidream import HiDream
from dcgen_convert.families.hunyuanimage import HunyuanImage
from dcgen_convert.families.krea2 import Krea2
from dcgen_convert.families.lumina2 import Lumina2
from dcgen_convert.families.ovis_image import OvisImage
from dcgen_convert.families.pixart import PixArt
from dcgen_convert.families.prx import PRX
from dcgen_convert.families.quant_targets import QuantTargets
from dcgen_convert.families.qwenimage import QwenImage
from dcgen_convert.families.qwenimage_edit import QwenImageEdit, QwenImageEditPlus
from dcgen_convert.families.sana import Sana
from dcgen_convert.families.sana_sprint import SanaSprint
from dcgen_convert.families.sana_video import SanaVideo
from dcgen_convert.families.sd3 import SD3
from dcgen_convert.families.unet import UNet
from dcgen_convert.families.unet_xl import UNetXL
from dcgen_convert.families.wan import Wan
from dcgen_convert.families.wan_a14b import WanA14B
from dcgen_convert.families.wan_image import WanImage
from dcgen_convert.families.wan_image_a14b import WanImageA14B
from dcgen_convert.families.zimage import ZImage

__all__ = [
    "COMPONENTS",
    "EVERY_COMPONENT",
    "EXPERT_NAMES",
    "FAMILIES",
    "Expert",
    "Family",
    "QuantTargets",
    "Text",
    "family_of",
    "get",
    "network_folder",
    "network_folders",
    "of_pipeline",
    "recognise",
    "refuse_videos",
]

# Tensor names are tried in this order. A family stands before another one whose tensor names it has too.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Flux2(),
        Chroma(),
        FluxKontext(),
        Flux(),
        SanaSprint(),
        Sana(),
        DiT(),
        SD3(),
        PixArt(),
        QwenImageEdit(),
        QwenImageEditPlus(),
        QwenImage(),
        Krea2(),
        ZImage(),
        Lumina2(),
        AuraFlow(),
        CogView4(),
        HunyuanImage(),
        HiDream(),
        OvisImage(),
        ErnieImage(),
        PRX(),
        SanaVideo(),
        WanImageA14B(),
        WanA14B(),
        WanImage(),
        Wan(),
        UNetXL(),
        UNet(),
    )
}


# Names that pipelines give to the network that is converted, the most frequent name first.
COMPONENTS = tuple(dict.fromkeys(("transformer", *(family.component for family in FAMILIES.values()))))
EXPERT_NAMES = tuple(dict.fromkeys(name for one in FAMILIES.values() for name in one.expert_names if name))
# Those of further networks too.
EVERY_COMPONENT = tuple(dict.fromkeys((*COMPONENTS, *(name for one in FAMILIES.values() for name in one.further))))


def network_folder(pipeline: Path) -> Path:
    """Folder of the network inside a pipeline folder: `transformer` or `unet`. `transformer` where neither exists."""
    folders = [Path(pipeline) / name for name in COMPONENTS]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def network_folders(pipeline: Path) -> list[Path]:
    """Folders of all networks inside a pipeline folder, the first one first."""
    further = (Path(pipeline) / name for name in EVERY_COMPONENT if name not in COMPONENTS)
    return [network_folder(pipeline), *(folder for folder in further if folder.is_dir())]


def get(name: str) -> Family:
    """The family with this name; InputError when there is none."""
    if name not in FAMILIES:
        raise InputError(f"no family is called {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def recognise(config: Mapping[str, Any], index: Mapping[str, Any] | None = None) -> Family | None:
    """The family of a network with this config; None when no family claims it.

    Args:
        index: model_index.json of its pipeline. Without one, a network that several pipelines share belongs to the
            family that draws from text.
    """
    claiming = (family for family in FAMILIES.values() if family.claims(config))
    return next((family for family in claiming if family.belongs(index or {})), None)


def of_pipeline(family: Family, index: Mapping[str, Any]) -> Family:
    """The family that has the network of ``family`` and is told by its pipeline, ``index``; else ``family``."""
    kin = (other for other in FAMILIES.values() if other.told_by_pipeline and other.model_class == family.model_class)
    return next((other for other in kin if other.belongs(index)), family)


def refuse_videos(family: Family, name: object) -> None:
    """InputError for the model ``name`` if it draws videos: what measures models takes pictures alone."""
    if family.axes == 3:
        raise InputError(
            f"{name} is a {family.name} model, which draws videos, and this verb takes models that draw pictures",
            "give a model that draws pictures; dcgen-convert recipes list shows some",
        )


def family_of(config: Mapping[str, Any], where: object, index: Mapping[str, Any] | None = None) -> Family:
    """Family of a network from its config.

    Args:
        where: what the config was read from, for the error.
        index: as `recognise`.
    Raises:
        InputError: no family claims it, or it is one of the models in `refused`.
    """
    refused.refuse(config, where, index)
    family = recognise(config, index)
    if family is None:
        classes = dict.fromkeys(known.model_class for known in FAMILIES.values())
        raise InputError(
            f"{where}: the class {config.get('_class_name', '(none)')} has no family here",
            f"supported: {', '.join(classes)}",
        )
    return family
