"""A small bundle that draws videos of 32 x 64 px, beside its source and its autoencoder."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from bundle.conftest import Parts, converted, manifest_of
from families.tiny_videos import VIDEOS

from dcgen_convert import families
from dcgen_convert.bundle.layout import BundleParts, write_bundle
from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import read_json
from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo

HEIGHT, WIDTH, FRAMES, F, C, SCALE = 32, 64, 5, 16, 8, 1.5


def autoencoder(folder: Path) -> Path:
    """A small DC-AE-V of f16."""
    torch.manual_seed(5)
    sizes = {"latent_channels": C, "block_out_channels": (8, 16, 16, 16, 32), "layers_per_block": (1,) * 5}
    AutoencoderDCVideo(**sizes, chunk_frames=8, scaling_factor=0.9).save_pretrained(folder)
    return folder


def build(name: str, root: Path) -> Path:
    """The bundle of family ``name`` in ``root``, with ``source`` and ``autoencoder`` beside it."""
    family = families.get(name)
    VIDEOS[name].build(root / "source")
    for network in family.components:
        config = read_json(root / "source" / network / "config.json")
        torch.manual_seed(4)
        model = diffusers.WanTransformer3DModel.from_config(family.convert_config(config, F, C, HEIGHT))
        converted(model, family, root / "source", root / network, network)
    autoencoder(root / "autoencoder")
    parts = Parts(family, root / "source", root / "transformer", root / "autoencoder", C, F, HEIGHT)
    manifest = manifest_of(parts)
    manifest["defaults"] |= {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "text_length": VIDEOS[name].length}
    scheduler = read_json(parts.source / "scheduler" / "scheduler_config.json")
    own = {"autoencoder": parts.autoencoder, "scheduler": scheduler, "scaling_factor": SCALE}
    own["further"] = {network: root / network for network in family.further}
    return write_bundle(root / "bundle", BundleParts(family, parts.source, parts.transformer, **own), manifest, NULL)
