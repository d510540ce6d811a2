"""Drawing with a converted transformer before there is a bundle: the stock pipeline with other parts, in memory."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import AutoencoderDC

from dcgen_convert.bundle.autoencoder_dc_adapter import AutoencoderDCAdapter
from dcgen_convert.bundle.layout import has_adapter
from dcgen_convert.core.files import read_json
from dcgen_convert.families.base import Network
from dcgen_convert.networks.folder import bundled
from dcgen_convert.networks.pipelines import quiet_diffusers
from dcgen_convert.stages import source_pipeline
from dcgen_convert.stages.job import Job


def converted_pipeline(job: Job, transformer: Network) -> Any:
    """The source's stock pipeline around ``transformer``, with the bundle's autoencoder, scheduler and settings."""
    keys = job.family.vae_config(read_json(job.target / "config.json"))
    options = {"scaling_factor": job.recipe.latents.scale_override} if job.recipe.latents.scale_override else {}
    with quiet_diffusers():
        if has_adapter(job.family):
            vae = AutoencoderDCAdapter.from_pretrained(
                job.target,
                dtype=job.dtype,
                latent_pack=job.family.pack(transformer.config),
                latent_order=job.family.adapter_order,
                **keys,
                **options,
            )
        elif job.family.axes == 3:
            kind = bundled(read_json(job.target / "config.json")["_class_name"])
            vae = kind.from_pretrained(job.target, dtype=job.dtype, **keys, **options)
        else:
            vae = AutoencoderDC.from_pretrained(job.target, dtype=job.dtype, **options)
            vae.register_to_config(**keys)
        parts = {job.family.component: transformer, "vae": vae.eval()}
        pipeline = source_pipeline.load(job.source, job.dtype, **parts)
    pipeline.register_to_config(**job.family.index_of_bundle(pipeline.config))
    scheduler = getattr(diffusers, job.scheduler["_class_name"])
    pipeline.scheduler = scheduler.from_config(job.scheduler)
    return pipeline
