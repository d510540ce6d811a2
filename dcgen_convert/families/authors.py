"""What the DC-Gen authors publish: their pipeline classes, and what their own code says when it draws.

Their folders hold neither the size of the pictures nor the timestep shift: the program that draws passes both (their
repository, generate.py and pipeline_dcgen_flux.py). So both are facts here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcgen_convert.core.errors import InputError
from dcgen_convert.families.base import Family

# Their pipeline class -> the family whose network it runs.
PIPELINES = {"DCGen_FluxPipeline": "flux"}
# Their other classes -> what these do that a bundle of this program does not.
OTHERS = {
    "DCVideoGenWanTextToVideoPipeline": "draws videos",
    "DCVideoGenWanImageToVideoPipeline": "draws videos",
    "DCQwenImageEditPipeline": "edits pictures",
}
STEPS, GUIDANCE, TEXT_LENGTH = 20, 3.5, 512  # defaults of their program and of their pipeline
RULES = ("flux2", "flux", "model")  # names of timestep shifts, see `bundle.scheduler`


@dataclass(frozen=True)
class Release:
    """One kind of published model: f and c of its autoencoder, side of its pictures in px, and its timestep shift."""

    name: str
    factor: int
    channels: int
    side: int
    shift: str


RELEASES = (Release("Res1K", 32, 32, 1024, "flux2"), Release("Res4K", 64, 128, 4096, "flux"))


def release_of(factor: int, channels: int) -> Release | None:
    """The published model with this latent space; None when there is none."""
    return next((item for item in RELEASES if (item.factor, item.channels) == (factor, channels)), None)


def pipeline_class(index: Mapping[str, Any]) -> str:
    """The pipeline class that a model_index.json names, also where it names a file of code beside it."""
    name = index.get("_class_name")
    return str(name[-1]) if isinstance(name, list) and name else str(name)


def is_theirs(index: Mapping[str, Any], family: Family | None) -> bool:
    """Whether a folder is in their layout: by its class, or by a plain AutoencoderDC where the stock pipeline of the
    ``family`` packs latents and cannot draw with it.
    """
    if pipeline_class(index) in PIPELINES:
        return True
    vae = index.get("vae")
    plain = isinstance(vae, list) and vae[1:] == ["AutoencoderDC"]
    return plain and family is not None and family.bundle_tier == 2


def refuse(index: Mapping[str, Any] | None, where: object, family: Family | None = None) -> None:
    """InputError for a folder in the authors' layout, where a stock pipeline is wanted.

    Args:
        index: its model_index.json; None: it has none.
        family: of its network, where it is known.
    """
    if index is not None and is_theirs(index, family):
        raise InputError(
            f"{where} is in the layout of the DC-Gen authors ({pipeline_class(index)} with a plain AutoencoderDC): no "
            "stock pipeline draws with it",
            f"dcgen-convert adopt {where} -o BUNDLE makes a bundle of it; then give the bundle",
        )
