"""Drawing with a converted transformer before it is a bundle: the stock pipeline with its parts exchanged in memory."""

from __future__ import annotations

import diffusers
from diffusers import AutoencoderDC
from torch import nn

from dcgen_convert.bundle.autoencoder_dc_adapter import AutoencoderDCAdapter
from dcgen_convert.bundle.layout import has_adapter
from dcgen_convert.core.files import read_json
from dcgen_convert.networks import pipelines
from dcgen_convert.networks.pipelines import quiet_diffusers


def converted_pipeline(job, transformer: nn.Module):
    """The source's stock pipeline around ``transformer``, with the new autoencoder and the bundle's scheduler."""
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
        else:
            vae = AutoencoderDC.from_pretrained(job.target, dtype=job.dtype, **options)
            vae.register_to_config(**keys)
        parts = {job.family.component: transformer, "vae": vae.eval()}
        pipeline = pipelines.load_pipeline(job.source, job.dtype, **parts)
    scheduler = getattr(diffusers, job.scheduler["_class_name"])
    pipeline.scheduler = scheduler.from_config(job.scheduler)
    return pipeline
