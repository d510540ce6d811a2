"""A stock WanPipeline and LTX-2's autoencoder: what docs/dc_ae_v.md says of them."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, UniPCMultistepScheduler, WanPipeline

from dcgen_convert.core.files import read_json, write_json

from .test_video_autoencoder import wan

C, F, T = 8, 32, 8
PAGE = Path(__file__).parents[2] / "docs" / "dc_ae_v.md"


@pytest.fixture
def folder(tmp_path):
    """A small random f32t8 of LTX-2's class, with statistics of its latents."""
    torch.manual_seed(0)
    vae = AutoencoderKLLTX2Video(
        latent_channels=C,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=F,
        temporal_compression_ratio=T,
    )
    vae.latents_mean.copy_(torch.randn(C))
    vae.latents_std.copy_(torch.rand(C) + 0.5)
    vae.save_pretrained(tmp_path)
    return tmp_path


def pipeline(vae) -> WanPipeline:
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=wan(C),
    )


@pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")
def test_the_stock_class_is_not_enough(folder):
    """The pipeline misses its keys; with the keys in config.json the weights do not load."""
    with pytest.raises(AttributeError, match="scale_factor_temporal"):
        pipeline(AutoencoderKLLTX2Video.from_pretrained(folder))
    config = read_json(folder / "config.json")
    keys = dict(z_dim=C, scale_factor_spatial=F, scale_factor_temporal=T, latents_mean=[0.0] * C, latents_std=[1.0] * C)
    write_json(folder / "config.json", {**config, **keys})
    with pytest.raises(AttributeError, match="'list' object has no attribute"):
        AutoencoderKLLTX2Video.from_pretrained(folder)


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_with_the_class_of_the_documentation_it_draws(folder, frames):
    """Against mean and standard deviation by hand, to 1e-5 of values from 0 to 1."""
    (code,) = re.findall(r"```python\n(import diffusers.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, made := {"__name__": "documentation"})
    pipe = pipeline(made["AutoencoderLTX2ForWan"].from_pretrained(folder))
    pipe.set_progress_bar_config(disable=True)
    text = torch.linspace(-1, 1, 4 * 16).reshape(1, 4, 16)
    drawn = {}
    for kind in ("pt", "latent"):
        drawn[kind] = pipe(
            prompt_embeds=text,
            negative_prompt_embeds=-text,
            height=64,
            width=96,
            num_inference_steps=2,
            num_frames=frames,
            output_type=kind,
            generator=torch.Generator().manual_seed(0),
        ).frames
    assert drawn["pt"].shape == (1, frames, 3, 64, 96)
    assert drawn["latent"].shape == (1, C, (frames - 1) // T + 1, 2, 3)
    vae = pipe.vae
    with torch.no_grad():
        z = drawn["latent"] * vae.latents_std.view(1, C, 1, 1, 1) + vae.latents_mean.view(1, C, 1, 1, 1)
        shown = (vae.decode(z).sample.movedim(1, 2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn["pt"], shown, atol=1e-5, rtol=0)
