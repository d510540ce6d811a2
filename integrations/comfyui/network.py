"""The transformer of an export inside ComfyUI: its own loader, told what the tensors do not say.

comfy is imported in the functions, so that this file can be read without ComfyUI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .facts import cells, shift

PATCHED = 4  # ComfyUI counts the memory of FLUX.1 for tokens of 2 x 2 cells; here a token is one cell


@contextmanager
def detected_as(network: Mapping[str, Any]) -> Iterator[None]:
    """Let ComfyUI's detection say ``network`` beside what it finds itself.

    It takes every FLUX.1 for a model with 16 channels at patch 2. There is no other way to tell it.
    """
    from comfy import model_detection

    original = model_detection.detect_unet_config

    def detect(*args: Any, **kwargs: Any) -> dict[str, Any] | None:
        found = original(*args, **kwargs)
        return None if found is None else {**found, **network}

    model_detection.detect_unet_config = detect
    try:
        yield
    finally:
        model_detection.detect_unet_config = original


def load(weights: dict[str, Any], metadata: dict[str, str], facts: Mapping[str, Any]) -> Any:
    """The transformer as a MODEL, with the timestep shift of the bundle's own size."""
    import comfy.sd

    with detected_as(facts["network"]):
        model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={}, metadata=metadata)
    if model is None:
        raise RuntimeError(f"ComfyUI does not recognise the transformer of {facts['bundle']}: update ComfyUI")
    model.model.latent_format = latent_format(facts["latent"])
    model.model.memory_usage_factor *= PATCHED
    model.model.dcgen = dict(facts)
    return at_size(model, facts["defaults"]["height"], facts["defaults"]["width"])


def latent_format(latent: Mapping[str, Any]) -> Any:
    """ComfyUI's description of the deep latent: DC-AE latents have a scale and no shift."""
    from comfy import latent_formats

    class DeepCompression(latent_formats.LatentFormat):
        latent_channels = latent["channels"]
        spacial_downscale_ratio = latent["factor"]  # ComfyUI spells it so
        scale_factor = latent["scaling_factor"]

    return DeepCompression()


def at_size(model: Any, height: int, width: int) -> Any:
    """A copy of the MODEL with the timestep shift for pictures of ``height`` x ``width`` px."""
    from comfy import model_sampling

    facts = facts_in(model)
    rows, columns = cells(height, width, facts["latent"]["factor"])

    class Sampling(model_sampling.ModelSamplingFlux, model_sampling.CONST):
        pass

    sampling = Sampling(model.model.model_config)
    sampling.set_parameters(shift=shift(facts["shift"], rows * columns))
    patched = model.clone()
    patched.add_object_patch("model_sampling", sampling)
    return patched


def facts_in(model: Any) -> dict[str, Any]:
    """The facts that `load` put into a MODEL; ValueError for a model of another loader."""
    found: dict[str, Any] | None = getattr(model.model, "dcgen", None)
    if found is None:
        raise ValueError("this MODEL does not come from the node `DC-Gen: load`")
    return found
