"""The nodes. comfy and folder_paths are imported when a node is used."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from . import network
from .autoencoder import TILES, DeepAutoencoder
from .facts import cells, facts_of, require_pair

AE = "DCGEN_AE"
CATEGORY = "DC-Gen"
BYTES_PER_PIXEL = 1800  # of a DC-AE at work in bfloat16, the most of the published ones
SIZE = {"default": 1024, "min": 32, "max": 16384, "step": 32}


class Load:
    """The pair that `dcgen-convert export` wrote: the transformer and its DC-AE."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", AE), ("model", "dc_ae")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import folder_paths

        return {
            "required": {
                "transformer": (folder_paths.get_filename_list("diffusion_models"),),
                "autoencoder": (folder_paths.get_filename_list("vae"),),
            }
        }

    def load(self, transformer: str, autoencoder: str) -> tuple[Any, DeepAutoencoder]:
        deep_weights, about = _read("vae", autoencoder)
        deep = facts_of(about, autoencoder, "config")
        weights, metadata = _read("diffusion_models", transformer)
        facts = facts_of(metadata, transformer, "network")
        require_pair(facts, deep)
        return network.load(weights, metadata, facts), DeepAutoencoder(deep, deep_weights)


class EmptyLatent:
    """An empty latent, and the model with the timestep shift that belongs to the size."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", "LATENT"), ("model", "latent")
    INPUTS: ClassVar[dict[str, Any]] = {
        "required": {
            "model": ("MODEL",),
            "width": ("INT", SIZE),
            "height": ("INT", SIZE),
            "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
        }
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return cls.INPUTS

    def make(self, model: Any, width: int, height: int, batch_size: int) -> tuple[Any, dict[str, torch.Tensor]]:
        latent = network.facts_in(model)["latent"]
        rows, columns = cells(height, width, latent["factor"])
        samples = torch.zeros(batch_size, latent["channels"], rows, columns)
        return network.at_size(model, height, width), {"samples": samples}


class Encode:
    """A picture as a latent of the DC-AE."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "encode", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",), "dc_ae": (AE,), "tiles": (list(TILES),)}}

    def encode(self, image: torch.Tensor, dc_ae: DeepAutoencoder, tiles: str) -> tuple[dict[str, torch.Tensor]]:
        _ready(dc_ae, image.shape[1], image.shape[2], tiles)
        return ({"samples": dc_ae.encode(image, tiles).cpu()},)


class Decode:
    """A latent of the DC-AE as a picture."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "decode", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",), "dc_ae": (AE,), "tiles": (list(TILES),)}}

    def decode(self, samples: dict[str, torch.Tensor], dc_ae: DeepAutoencoder, tiles: str) -> tuple[torch.Tensor]:
        latents, factor = samples["samples"], dc_ae.latent["factor"]
        _ready(dc_ae, latents.shape[2] * factor, latents.shape[3] * factor, tiles)
        return (dc_ae.decode(latents, tiles).cpu(),)


def _read(folder: str, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    import folder_paths
    from comfy import utils

    found: tuple[dict[str, torch.Tensor], dict[str, str]] = utils.load_torch_file(
        folder_paths.get_full_path_or_raise(folder, name), return_metadata=True
    )
    return found


def _ready(dc_ae: DeepAutoencoder, height: int, width: int, tiles: str) -> None:
    """Let ComfyUI put the DC-AE on its device, with room for a picture or a tile of it."""
    from comfy import model_management, model_patcher

    if not hasattr(dc_ae, "patcher"):
        device = model_management.get_torch_device()
        dc_ae.to(model_management.vae_dtype(device, [torch.bfloat16, torch.float32]))
        dc_ae.patcher = model_patcher.ModelPatcher(
            dc_ae, load_device=device, offload_device=model_management.vae_offload_device()
        )
    side = dc_ae.side(height, width, tiles)
    pixels = height * width if side is None else side * side
    memory = pixels * BYTES_PER_PIXEL
    model_management.load_models_gpu([dc_ae.patcher], memory_required=memory, force_full_load=True)


NODE_CLASS_MAPPINGS = {
    "DCGenLoad": Load,
    "DCGenEmptyLatent": EmptyLatent,
    "DCGenEncode": Encode,
    "DCGenDecode": Decode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DCGenLoad": "DC-Gen: load",
    "DCGenEmptyLatent": "DC-Gen: empty latent",
    "DCGenEncode": "DC-Gen: encode",
    "DCGenDecode": "DC-Gen: decode",
}
