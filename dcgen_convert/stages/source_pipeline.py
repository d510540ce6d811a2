"""The stock pipeline of a source, also of a source that is a bundle with the in-bundle adapter."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from dcgen_convert.bundle.loading import adapter_part, own_adapter
from dcgen_convert.bundle.scheduler import scheduler_config
from dcgen_convert.checkpoint import trust
from dcgen_convert.checkpoint.source import Source
from dcgen_convert.families.base import Pipeline
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe import drawable
from dcgen_convert.recipe.identity import Identity


def load(source: Source, dtype: torch.dtype, **components: Any) -> Pipeline:
    """As `pipelines.load_pipeline`; the adapter is this program's own class."""
    vae = source.index.get("vae", ())
    if "vae" in components:  # diffusers compares it with the class that the index names
        with own_adapter(vae[0]) if trust.is_adapter(vae) else nullcontext():
            return pipelines.load_pipeline(source, dtype, **components)
    with adapter_part(source.root, source.index, dtype) as own:
        return pipelines.load_pipeline(source, dtype, **own, **components)


def text_encoders(source: Source, dtype: torch.dtype) -> Pipeline:
    """The pipeline without transformer and autoencoder. It can encode prompts."""
    return load(source, dtype, **dict.fromkeys((*source.family.components, "vae")))


def cap_shift(pipeline: Pipeline, source: Identity, side: int) -> None:
    """Let the pipeline of ``source`` draw ``side`` px with the largest timestep shift of its training at most.

    Only a dynamic shift, at a size beyond the training, is replaced: by a static one, in a copy of the scheduler.
    """
    found = drawable.beyond(source, side)
    if found is not None and found.shift is not None:
        config = scheduler_config(dict(pipeline.scheduler.config), found.shift)
        pipeline.scheduler = pipeline.scheduler.from_config(config)
