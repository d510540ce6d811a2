"""Configs of the published deep-compression autoencoders, as diffusers' AutoencoderDC and our AutoencoderDCVideo take
them.

Sources: arXiv 2410.10733 (DC-AE 1.0), arXiv 2508.00413 (DC-AE 1.5), the authors' list of models, and their code
(DC-AE-V).
"""

from __future__ import annotations

import math
from typing import Any

from dcgen_convert.families.catalog import AutoencoderEntry

WIDTHS = (128, 256, 512, 512, 1024, 1024, 2048, 2048)
FLAT = (128, 256, 512, 512, 1024, 1024, 1024)  # DC-AE 1.5
VIDEO = (256, 512, 512, 1024, 1024, 1024, 1024)  # DC-AE-V, whose first level has no blocks
IN, SANA, LITE, FIFTEEN = "-in-", "-sana-", "lite", "1.5"


def kind_of(entry: AutoencoderEntry) -> str | None:
    """IN (also `mix`: the same network), SANA, LITE or FIFTEEN; None for videos and for another make."""
    name = (entry.repo or "").partition("dc-ae-")[2]
    if name.startswith((LITE, FIFTEEN)):
        return LITE if name.startswith(LITE) else FIFTEEN
    return next((kind for word, kind in ((IN, IN), ("-mix-", IN), (SANA, SANA)) if word in name), None)


def config_of(entry: AutoencoderEntry) -> dict[str, Any]:
    """The config.json of a published autoencoder. TypeError for one of another make.

    scaling_factor is left out where none is published.
    """
    kind, levels = kind_of(entry), int(math.log2(entry.factor)) + 1
    if entry.given:
        return _video(entry, levels)
    if kind is None:
        raise TypeError(f"{entry.alias} is no published deep-compression autoencoder")
    widths = list((FLAT if kind == FIFTEEN else WIDTHS)[:levels])
    common: dict[str, Any] = {
        "_class_name": "AutoencoderDC",
        "latent_channels": entry.channels,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
    }
    if entry.scaling_factor is not None:
        common["scaling_factor"] = entry.scaling_factor
    return {**common, **{IN: _in, SANA: _sana, LITE: _lite, FIFTEEN: _fifteen}[kind](levels)}


def _video(entry: AutoencoderEntry, levels: int) -> dict[str, Any]:
    """DC-AE-V. In its f64 the convolution that makes four frames of one was set to chunks that it never meets."""
    return {
        "_class_name": "AutoencoderDCVideo",
        "latent_channels": entry.channels,
        "block_out_channels": list(VIDEO[:levels]),
        "layers_per_block": [5, 10] + [4] * (levels - 2),
        "spatial_compression_ratio": entry.factor,
        "chunk_frames": 40,
        "causal_time": entry.factor == 32,
        "scaling_factor": entry.scaling_factor,
    }


def _in(levels: int) -> dict[str, Any]:
    """DC-AE 1.0, kinds `in` and `mix`."""
    inner = levels - 3
    blocks = ["ResBlock"] * 3 + ["EfficientViTBlock"] * inner
    return {
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_layers_per_block": [0, 4, 8] + [2] * inner,
        "decoder_layers_per_block": [0, 5, 10] + [2] * inner,
        "encoder_qkv_multiscales": [[]] * levels,
        "decoder_qkv_multiscales": [[]] * levels,
        "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * inner,
        "decoder_act_fns": ["relu"] * 3 + ["silu"] * inner,
    }


def _sana(levels: int) -> dict[str, Any]:
    """SANA's autoencoder."""
    return {
        **_sana_encoder(),
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_layers_per_block": [3] * levels,
        "decoder_qkv_multiscales": [[]] * 3 + [[5]] * 3,
        "upsample_block_type": "interpolate",
    }


def _lite(levels: int) -> dict[str, Any]:
    """SANA's encoder with a faster decoder."""
    return {
        **_sana_encoder(),
        "decoder_block_types": "ResBlock",
        "decoder_layers_per_block": [0, 3, 5, 4, 4, 4],
        "decoder_qkv_multiscales": [[]] * levels,
        "decoder_conv_act_fn": "silu",
    }


def _sana_encoder() -> dict[str, Any]:
    return {
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "encoder_qkv_multiscales": [[]] * 3 + [[5]] * 3,
        "downsample_block_type": "conv",
    }


def _fifteen(levels: int) -> dict[str, Any]:
    """DC-AE 1.5: convolutions only. The shortcuts beside the latent are left out, because its channels are ordered."""
    layers = [0, 5, 10] + [4] * (levels - 3)
    return {
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_layers_per_block": layers,
        "decoder_layers_per_block": layers,
        "encoder_qkv_multiscales": [[]] * levels,
        "decoder_qkv_multiscales": [[]] * levels,
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
        "decoder_conv_act_fn": "silu",
    }
