"""The two forms of a 4-bit transformer folder, as diffusers knows them by `quant_method` in config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.core.files import read_object

NUNCHAKU_LITE = "nunchaku_lite"  # SVDQuant: config.json lists the linears
BFL = "bfl"  # plain block-16 NVFP4: the tensors show the linears
MARK = ".weight_scale_2"  # of the form bfl: ends the name of one tensor of each 4-bit linear


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether config.json says the form `bfl`."""
    return (config.get("quantization_config") or {}).get("quant_method") == BFL


def plain_linears(tensors: Iterable[str]) -> list[str]:
    """Paths of the linears that are 4-bit in the form `bfl`, from the names of all tensors."""
    return [name.removesuffix(MARK) for name in tensors if name.endswith(MARK)]


def quantised_formats(config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, str]:
    """Module path -> "nvfp4", "int4" or "awq", from config.json and the names of the tensors; empty for a dense one."""
    quantisation = config.get("quantization_config") or {}
    if is_plain(config):
        return dict.fromkeys(plain_linears(tensors), "nvfp4")
    svdq, awq = quantisation.get("svdq_w4a4") or {}, quantisation.get("awq_w4a16") or {}
    return {path: svdq["precision"] for path in svdq.get("targets", ())} | {
        path: "awq" for path in awq.get("targets", ())
    }


def formats_of(folder: Path) -> dict[str, str]:
    """`quantised_formats` of a transformer folder. The weights are looked at only where they must be."""
    config = read_object(folder / "config.json")
    return quantised_formats(config, read_weights(folder) if is_plain(config) else ())
