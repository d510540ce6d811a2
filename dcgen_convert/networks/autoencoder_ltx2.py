# SPDX-License-Identifier: Apache-2.0
"""AutoencoderLTX2ForWan: LTX-2's video autoencoder of diffusers, with a config that states what pipelines of Wan read.

Its first latent frame is of the first frame alone, and each other one of eight frames: 1 + 8 n frames make 1 + n latent
frames, and are all given back. A stock WanPipeline asks for as many.

The pipeline reads the mean and the standard deviation of each latent channel in the config, and diffusers' class holds
them as tensors beside the weights. Keys of these names in config.json do not help: diffusers then takes the keys for
the tensors, and the weights no longer load. So they are shown when the config is asked for, and are not in the file.

Legend: B batch, c latent channels, T latent frames, f spatial compression.

The file is copied into a bundle's vae/ folder and loaded from there by diffusers: it imports diffusers only. Loaded
from a bundle it lands in one shared module cache under its file name; the version in the name keeps two bundles with
different code apart. When you change its code, change MODULE_NAME too.
"""

import functools
import sys
from pathlib import Path
from types import ModuleType

from diffusers import AutoencoderKLLTX2Video, ModelMixin
from diffusers.configuration_utils import FrozenDict

MODULE_NAME = "autoencoder_ltx2_v1"
CLASS_NAME = "AutoencoderLTX2ForWan"


class AutoencoderLTX2ForWan(AutoencoderKLLTX2Video):
    """diffusers' AutoencoderKLLTX2Video, with the same arguments, tensors and methods.

    Its `config` has more keys: z_dim, latents_mean, latents_std, scale_factor_temporal and scale_factor_spatial.
    """

    # The name that save_pretrained writes into model_index.json, and the file that it then looks for.
    __module__ = MODULE_NAME

    @property
    def config(self) -> FrozenDict:
        """The config of diffusers' class with what pipelines of Wan read; lists of c numbers are of the tensors."""
        own = super().config
        stated = {
            "z_dim": own.latent_channels,
            "scale_factor_temporal": own.temporal_compression_ratio,
            "scale_factor_spatial": own.spatial_compression_ratio,
        }
        if not self.latents_mean.is_meta:
            stated |= {"latents_mean": self.latents_mean.tolist(), "latents_std": self.latents_std.tolist()}
        return FrozenDict({**own, **stated})

    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in diffusers, and this file with it: without it the saved folder could not be loaded again."""
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, f"{MODULE_NAME}.py").write_text(
            Path(__file__).read_text(encoding="utf-8"), encoding="utf-8"
        )


def _first(kind: type) -> type:
    """`kind`, or the class that an earlier run of this very file has made: diffusers runs the file at each load.

    Pickle, and a pipeline that is given an autoencoder, look for the class in the module of this name. ModelMixin is
    there too, because a pipeline compares the class with it.
    """
    code = Path(__file__).read_bytes()
    module = sys.modules.get(MODULE_NAME)
    if module is None or vars(module).get("code") != code:
        module = sys.modules[MODULE_NAME] = ModuleType(MODULE_NAME)
        vars(module).update({CLASS_NAME: kind, "ModelMixin": ModelMixin, "code": code})
    return vars(module)[CLASS_NAME]


AutoencoderLTX2ForWan = _first(AutoencoderLTX2ForWan)
