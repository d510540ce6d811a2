"""Configs that older versions of diffusers wrote, as today's version writes them.

DiT and PixArt were published as `Transformer2DModel`; diffusers has given each a class of its own since, told apart by
norm_type (diffusers 0.42 model_loading_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLASS = "Transformer2DModel"
RENAMED = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
_GONE = ("num_vector_embeds", "only_cross_attention", "use_linear_projection")
# Class -> settings of the old class that the new one does not have.
DROPPED = {
    "DiTTransformer2DModel": (
        *_GONE,
        "attention_type",
        "caption_channels",
        "cross_attention_dim",
        "double_self_attention",
        "interpolation_scale",
        "use_additional_conditions",
    ),
    "PixArtTransformer2DModel": (*_GONE, "double_self_attention"),
}


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the class and the settings of today; a config that is not of an old class is only copied.

    `_name_or_path` is left out: it is the folder on the machine where the model was saved.
    """
    found = {key: value for key, value in config.items() if key != "_name_or_path"}
    name = RENAMED.get(str(found.get("norm_type"))) if found.get("_class_name") == CLASS else None
    if name is None:
        return found
    return {key: value for key, value in found.items() if key not in DROPPED[name]} | {"_class_name": name}
