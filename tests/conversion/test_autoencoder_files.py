"""Autoencoders that are no diffusers folder: rewritten, they compute what the original computes."""

import re

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import save_file

from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.families import catalog, grid
from dcgen_convert.networks import autoencoder_files, autoencoders
from dcgen_convert.recipe import geometry
from dcgen_convert.stages.job import find_autoencoder

C, K, F = 8, 4, 4


def published(channels: int, widths: tuple[int, ...], layers: tuple[int, ...]) -> dict:
    """Config of an AutoencoderDC of the published form, with `layers` residual blocks per level."""
    ends = ("encoder", "decoder")
    config: dict = {"latent_channels": channels, "upsample_block_type": "pixel_shuffle"}
    config |= {f"{end}_block_types": "ResBlock" for end in ends}
    config |= {f"{end}_block_out_channels": widths for end in ends}
    config |= {f"{end}_layers_per_block": layers for end in ends}
    return config | {f"{end}_qkv_multiscales": ((),) * len(widths) for end in ends}


@pytest.fixture
def original(tmp_path):
    """(folder, model) of a small AutoencoderDC of the published form: first level skipped, batch norm, both
    shortcuts.
    """
    torch.manual_seed(0)
    norms = dict(decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"), decoder_act_fns=("relu", "relu", "silu"))
    model = AutoencoderDC(**published(C, (8, 16, 32), (0, 1, 1)), **norms, scaling_factor=0.4).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.rand_like(value) + (0.5 if "running_var" in name else 0.0))
    model.save_pretrained(tmp_path / "ae")
    return tmp_path / "ae", model


def authors_name(name: str) -> str:
    """The tensor name of diffusers' AutoencoderDC in the authors' checkpoints (arXiv 2410.10733)."""
    ends = {
        "encoder.conv_in.conv.": "encoder.project_in.conv.conv.",
        "encoder.conv_out.": "encoder.project_out.main.op_list.0.conv.",
        "decoder.conv_in.": "decoder.project_in.main.conv.",
        "decoder.norm_out.": "decoder.project_out.op_list.0.",
        "decoder.conv_out.conv.": "decoder.project_out.op_list.2.conv.conv.",
    }
    for ours, theirs in ends.items():
        if name.startswith(ours):
            return name.replace(ours, theirs)
    name = re.sub(r"(down|up)_blocks\.(\d+)\.(\d+)\.", r"stages.\2.op_list.\3.main.", name)
    return re.sub(r"main\.(conv\d?)\.", r"main.\1.conv.", name).replace("main.norm.", "main.conv2.norm.")


@pytest.mark.parametrize("names", [authors_name, str])
def test_a_single_file_becomes_the_same_folder(names, original, tmp_path):
    folder, model = original
    file = tmp_path / "dc-ae.safetensors"
    save_file({names(name): value for name, value in model.state_dict().items()}, file)
    assert geometry.new_grid(f"{file}:{folder}") == grid.Grid(F, C, 1)
    ae = find_autoencoder(f"{file}:{folder}", tmp_path / "work")
    again = AutoencoderDC.from_pretrained(ae.folder).state_dict()
    assert (ae.factor, ae.channels) == (F, C) and again.keys() == model.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    stamp = (ae.folder / "config.json").stat().st_mtime_ns
    assert (
        find_autoencoder(f"{file}:{folder}", tmp_path / "work").folder.joinpath("config.json").stat().st_mtime_ns
        == stamp
    )


def test_a_single_file_must_say_what_it_is(original, tmp_path):
    folder, model = original
    file = tmp_path / "dc-ae.safetensors"
    save_file(model.state_dict(), file)
    with pytest.raises(InputError, match="share their tensor names"):
        find_autoencoder(str(file), tmp_path / "work")
    with pytest.raises(InputError, match="its config asks for"):
        find_autoencoder(f"{file}:dc-ae-f32-mix", tmp_path / "work")
    with pytest.raises(InputError, match="diffusers cannot translate"):
        find_autoencoder(f"{file}:dc-ae-1.5-f64", tmp_path / "work")
    with pytest.raises(InputError, match="neither an alias nor a folder"):
        find_autoencoder(f"{file}:nowhere", tmp_path / "work")
    with pytest.raises(InputError, match="no such file"):
        find_autoencoder(f"{tmp_path / 'other.safetensors'}:{folder}", tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "alias", ["dc-ae-f32-in", "dc-ae-f32-mix", "dc-ae-f32-sana-1.1", "dc-ae-f64-in", "dc-ae-f128-mix"]
)
def test_shipped_configs_have_the_published_sizes(alias):
    """Parameters within 0.5 % of the published number, which is rounded to a million."""
    entry, config = catalog.AUTOENCODERS[alias], autoencoder_files.published_config(alias)
    assert (
        grid.autoencoder_grid(config) == (entry.factor, entry.channels)
        and config["scaling_factor"] == entry.scaling_factor
    )
    with torch.device("meta"):
        model = AutoencoderDC.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(entry.parameters, rel=5e-3)


@pytest.mark.parametrize("rms", [None, [0.5, 2.0, 3.0, 1.5]])
def test_the_first_channels_are_those_of_the_original_and_the_rest_decodes_as_zero(rms, original, tmp_path):
    """Against the original's own encode and decode, to 1e-5."""
    folder, model = original
    autoencoder_files.write_rewritten(folder, tmp_path / "less", K, None if rms is None else torch.tensor(rms))
    codec = autoencoders.load(tmp_path / "less")
    scale = torch.tensor(rms or [1.0] * K)[:, None, None]
    pixels, z = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, K, 4, 6)
    with torch.no_grad():
        mine, theirs = codec.model.encode(pixels).latent, model.encode(pixels).latent[:, :K] / scale
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        whole = torch.cat([z * scale, torch.zeros(2, C - K, 4, 6)], 1)
        torch.testing.assert_close(codec.model.decode(z).sample, model.decode(whole).sample, atol=1e-5, rtol=1e-5)
    assert codec.scale == (0.4 if rms is None else 1.0)


def test_a_prefix_goes_through_the_same_door(original, tmp_path):
    folder, _ = original
    ae = find_autoencoder(str(folder), tmp_path / "work", channels=K)
    assert ae.channels == K == autoencoders.load(ae.folder).channels
    assert find_autoencoder(str(folder), tmp_path / "work", channels=C).folder == folder
    assert geometry.new_grid(str(folder), channels=K) == grid.Grid(F, K, 1)
    with pytest.raises(RecipeError, match="has 8 channels"):
        geometry.new_grid(str(folder), channels=9)


def test_f128_decodes_in_tiles_that_fit(tmp_path):
    """17 cells are 2176 px, which are decoded in tiles. Size as without tiles, and the same pixels away from the
    seams, to 1e-5.
    """
    widths = (8,) * 8
    torch.manual_seed(0)
    AutoencoderDC(**{**published(8, widths, (0,) + (1,) * 7), "upsample_block_type": "interpolate"}).save_pretrained(
        tmp_path
    )
    codec = autoencoders.load(tmp_path)
    z = torch.randn(1, 8, 17, 9)
    with torch.no_grad():
        plain = codec.model.decode(z / codec.scale).sample.clamp(-1, 1)
    tiled = codec.decode(z)
    assert tiled.shape == plain.shape == (1, 3, 2176, 1152)
    assert not torch.equal(tiled, plain)
    torch.testing.assert_close(tiled[..., :192, :192], plain[..., :192, :192], atol=1e-5, rtol=1e-5)
