"""What the server of `warm` imports: the large packages, as a conversion loads them."""

# ruff: noqa: E402, F401  the verbosity comes first, and importing is all
import sys

PATH = sys.path[:]  # as Python started with it

from dcgen_convert.cli import app, session

session._hush()

import diffusers.models.autoencoders.autoencoder_dc
import diffusers.models.transformers
import diffusers.pipelines.flux.pipeline_flux
import diffusers.pipelines.sana.pipeline_sana
import peft
import transformers.models.clip.modeling_clip
import transformers.models.t5.modeling_t5

import dcgen_convert.cli.verbs
import dcgen_convert.ranks.launch
from dcgen_convert import conversion, quantization
from dcgen_convert.stages import adapt, align_embedder, align_head, bundle, compare, imported, latents, quantize, tasks
from dcgen_convert.train import distributed

distributed.deepspeed()
