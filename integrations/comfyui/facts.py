"""What the metadata of an exported file says, and the arithmetic that follows. Neither torch nor comfy is needed.

f px per side of a latent cell. mu: the timestep shift, sigma' = e^mu / (e^mu + 1 / sigma - 1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

KEY = "dcgen"
SCHEMA = "dcgen.comfyui/1"


def facts_of(metadata: Mapping[str, str] | None, name: str, part: str) -> dict[str, Any]:
    """The facts in the metadata of the file ``name``. part: "network" for a transformer, "config" for a DC-AE.

    Raises:
        ValueError: the file is not one of `dcgen-convert export`, or it is the other one of the pair.
    """
    text = (metadata or {}).get(KEY)
    if text is None:
        raise ValueError(f"{name} was not written by `dcgen-convert export BUNDLE --to comfyui`")
    facts: dict[str, Any] = json.loads(text)
    if facts.get("schema") != SCHEMA:
        raise ValueError(f"{name} has the schema {facts.get('schema')!r}, these nodes read {SCHEMA!r}: update them")
    if part not in facts:
        raise ValueError(f"{name} is the other file of the pair: the DC-AE's name ends with -dc-ae.safetensors")
    return facts


def require_pair(transformer: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> None:
    """ValueError unless both files speak of the same latent."""
    if transformer["latent"] != autoencoder["latent"]:
        raise ValueError(
            f"the transformer of {transformer['bundle']} does not belong to the DC-AE of {autoencoder['bundle']}: "
            "their latents differ"
        )


def cells(height: int, width: int, factor: int) -> tuple[int, int]:
    """Rows and columns of the latent of a picture of ``height`` x ``width`` px; ValueError for other sizes."""
    if height % factor or width % factor:
        raise ValueError(f"{width} x {height} px: both sides must be multiples of {factor} px")
    return height // factor, width // factor


def shift(line: Sequence[Sequence[float]], tokens: int) -> float:
    """mu for a picture of ``tokens`` latent cells. line: two points [tokens, mu]."""
    (n0, mu0), (n1, mu1) = line
    return mu0 + (mu1 - mu0) * (tokens - n0) / (n1 - n0)
