"""LTX-2's autoencoder and pipelines of Wan: what diffusers' class lacks, and AutoencoderLTX2ForWan, which has it."""

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video, UniPCMultistepScheduler, WanPipeline
from families.tiny_videos import ltx_vae

from dcgen_convert.bundle import checks, layout
from dcgen_convert.bundle.expected import expected_tensors
from dcgen_convert.checkpoint import trust
from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.core.files import read_json, sha256, write_json
from dcgen_convert.families.grid import Time, autoencoder_grid, autoencoder_time
from dcgen_convert.networks import autoencoder_ltx2, autoencoders, tiles
from dcgen_convert.networks.autoencoder_ltx2 import AutoencoderLTX2ForWan
from dcgen_convert.networks.folder import load_folder

from .test_video_autoencoder import wan

C, F, T = 8, 32, 8


@pytest.fixture
def folder(tmp_path):
    """A small random f32t8 of LTX-2's class, with statistics of its latents away from 0 and 1."""
    ltx_vae(C).save_pretrained(tmp_path)
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
def test_with_our_class_it_draws_as_many_frames_as_asked(folder, frames):
    """Against mean and standard deviation by hand, to 1e-5 of values from 0 to 1."""
    pipe = pipeline(AutoencoderLTX2ForWan.from_pretrained(folder))
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
    vae = AutoencoderKLLTX2Video.from_pretrained(folder)
    with torch.no_grad():
        z = drawn["latent"] * vae.latents_std.view(1, C, 1, 1, 1) + vae.latents_mean.view(1, C, 1, 1, 1)
        shown = (vae.decode(z).sample.movedim(1, 2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn["pt"], shown, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_the_codec_against_the_stock_autoencoder(folder, frames):
    """Of both classes: (z - mean) / std and back, to 1e-5 and 1e-4."""
    stock = AutoencoderKLLTX2Video.from_pretrained(folder)
    pixels = torch.rand(2, 3, frames, 64, 96) * 2 - 1
    mean, std = (value.view(1, C, 1, 1, 1) for value in (stock.latents_mean, stock.latents_std))
    with torch.no_grad():
        raw = stock.encode(pixels).latent_dist.mode()
        back = stock.decode(raw).sample.clamp(-1, 1)
    for kind in (AutoencoderKLLTX2Video, AutoencoderLTX2ForWan):
        kind.from_pretrained(folder).save_pretrained(folder / kind.__name__)
        codec = autoencoders.load(folder / kind.__name__)
        assert (codec.axes, codec.factor, codec.channels, codec.scaling) == (3, F, C, 1.0)
        z = codec.encode(pixels)
        assert z.shape == (2, C, (frames - 1) // T + 1, 2, 3)
        torch.testing.assert_close(z, (raw - mean) / std, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(codec.decode(z), back, atol=1e-4, rtol=1e-4)


def test_a_saved_folder_has_the_same_tensors_and_the_file(folder):
    """The statistics are shown, and not written: config.json stays as diffusers' class reads it."""
    model = AutoencoderLTX2ForWan.from_pretrained(folder)
    model.save_pretrained(folder / "vae")
    config = read_json(folder / "vae" / "config.json")
    assert config["_class_name"] == autoencoder_ltx2.CLASS_NAME and "latents_mean" not in config
    assert trust.is_own(folder / "vae" / f"{autoencoder_ltx2.MODULE_NAME}.py")
    again = load_folder(folder / "vae", "autoencoder", torch.float32)
    assert type(again) is AutoencoderLTX2ForWan and isinstance(again, diffusers.AutoencoderKLLTX2Video)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert again.config.latents_std == pytest.approx(model.latents_std.tolist())
    assert (again.config.z_dim, again.config.scale_factor_spatial, again.config.scale_factor_temporal) == (C, F, T)
    expected, problems = expected_tensors(folder / "vae")
    assert expected.keys() == model.state_dict().keys() and not problems
    assert layout.video_config(read_json(folder / "config.json"))["_class_name"] == autoencoder_ltx2.CLASS_NAME


def test_its_code_is_known_by_its_hash(folder):
    """With one letter changed it is foreign. In a bundle nothing of its config follows from other keys."""
    AutoencoderLTX2ForWan.from_pretrained(folder).save_pretrained(folder / "vae")
    index = {"vae": [autoencoder_ltx2.MODULE_NAME, autoencoder_ltx2.CLASS_NAME]}
    assert trust.is_adapter(index["vae"]) and trust.foreign(folder, index) == [] and checks.check_latents(folder) == []
    file = folder / "vae" / f"{autoencoder_ltx2.MODULE_NAME}.py"
    assert sha256(file) == trust.ADAPTERS[autoencoder_ltx2.MODULE_NAME][-1]
    file.write_text(file.read_text() + " ")
    (sentence,) = trust.foreign(folder, index)
    assert "differs from every version of it that this program has written" in sentence


def test_facts_that_its_config_must_state(folder):
    config = read_json(folder / "config.json")
    assert autoencoder_grid(config) == (F, C) and autoencoder_time(config) == Time(T, alone=True)
    for key in ("temporal_compression_ratio", "spatial_compression_ratio"):
        with pytest.raises(RecipeError, match="lacks temporal_compression_ratio or spatial_compression_ratio"):
            autoencoder_time({**config, key: None})
    others = {
        "scaling_factor": (0.5, "a scaling factor beside the statistics of its channels"),
        "timestep_conditioning": (True, "a decoder that is given a timestep"),
        "decoder_inject_noise": ([False, True, False, False], "a decoder that adds noise"),
    }
    for key, (value, words) in others.items():
        write_json(folder / "config.json", {**config, key: value})
        with pytest.raises(InputError, match=words):
            autoencoders.load(folder)
    write_json(folder / "config.json", {**config, "temporal_compression_ratio": 4})  # it has 8
    with pytest.raises(InputError, match=r"cannot encode 5 frames of 64 px, of which .* \(1, 8, 2, 2, 2\)"):
        autoencoders.load(folder)


def test_it_is_taken_whole_where_its_tiles_would_fail(folder):
    """480 px are 15 cells: of tiles of 16 cells, 14 apart, the second row has one cell, which cannot be mirrored."""
    model = AutoencoderLTX2ForWan.from_pretrained(folder)
    z = torch.randn(1, C, 1, 15, 17)
    with tiles.by_size(model, 1, 480, 544):
        assert not model.use_tiling and tiles.tile_of(model, 2**13, 2**13) == 0
    model.enable_tiling()
    with torch.no_grad(), pytest.raises(RuntimeError, match="[Pp]adding"):
        model.decode(z)
