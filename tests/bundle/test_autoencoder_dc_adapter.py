"""The adapter against AutoencoderDC and against the stock pipelines' own packing."""

import ast
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_img2img import retrieve_latents
from einops import rearrange

from dcgen_convert.bundle import autoencoder_dc_adapter as adapter
from dcgen_convert.bundle.autoencoder_dc_adapter import AutoencoderDCAdapter, collect, expose

from .conftest import autoencoder_dc


def adapted(factor: int, channels: int, **options) -> AutoencoderDCAdapter:
    stock = autoencoder_dc(factor, channels)
    config = {key: value for key, value in stock.config.items() if not key.startswith("_")}
    model = AutoencoderDCAdapter(**config, **options).eval()
    model.load_state_dict(stock.state_dict())
    return model


def test_name_changes_with_the_code():
    """Bundles share one module cache under this name, so two files of one name must have the same code."""
    written = Path(__file__).parents[1] / "project" / "version_0_1_0" / "bundle" / "vae"
    for old in written.glob("*.py"):
        assert (code_of(Path(adapter.__file__)) == code_of(old)) == (old.stem == adapter.MODULE_NAME)


def code_of(file: Path) -> str:
    """The code of a Python file without its comments and its first docstring."""
    return ast.dump(ast.Module(ast.parse(file.read_text(encoding="utf-8")).body[1:], []))


def test_file_names_its_licence_since_it_travels_alone():
    assert Path(adapter.__file__).read_text().splitlines()[0] == "# SPDX-License-Identifier: Apache-2.0"


@pytest.mark.parametrize("channels", [32, 128])
def test_flux_packing_gives_back_the_deep_token(channels):
    deep = torch.randn(2, channels, 3, 5)
    exposed = expose(deep, 2, "c_first")
    packed = FluxPipeline._pack_latents(exposed, 2, channels // 4, 6, 10)  # (B, N, c)
    assert torch.equal(packed, rearrange(deep, "b c h w -> b (h w) c"))


def test_c_last_is_the_patch_order_with_channels_last():
    deep = torch.randn(2, 32, 3, 5)
    exposed = expose(deep, 2, "c_last")
    patches = rearrange(exposed, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
    assert torch.equal(patches, rearrange(deep, "b c h w -> b (h w) c"))


@pytest.mark.parametrize("order", adapter.ORDERS)
@pytest.mark.parametrize("pack", [1, 2, 4])
def test_collect_undoes_expose(order, pack):
    deep = torch.randn(2, 32, 3, 5)
    assert torch.equal(collect(expose(deep, pack, order), pack, order), deep)


@pytest.mark.parametrize("factor,channels", [(32, 32), (64, 128)])
def test_same_pictures_as_stock(factor, channels):
    stock, model = autoencoder_dc(factor, channels), adapted(factor, channels)
    picture = torch.rand(1, 3, factor, 2 * factor) * 2 - 1
    with torch.no_grad():
        deep = stock.encode(picture).latent
        exposed = model.encode(picture).latents
        assert exposed.shape == (1, channels // 4, 2, 4)
        assert torch.equal(collect(exposed, 2, "c_first"), deep)
        assert torch.equal(model.decode(exposed).sample, stock.decode(deep).sample)
        assert torch.equal(model.decode(deep, return_dict=False)[0], stock.decode(deep).sample)
        assert torch.equal(model(picture).sample, stock(picture).sample)


def test_a_picture_with_a_part_of_a_cell_is_resized_to_whole_cells():
    """As pipelines that edit count them; both sides of 1 or more cells, with and without a frame axis."""
    model, picture = adapted(64, 128), torch.rand(1, 3, 96, 160) * 2 - 1
    whole = torch.nn.functional.interpolate(picture, size=(64, 128), mode="bilinear", antialias=True)
    with torch.no_grad():
        wanted = model.encode(whole).latents
        assert wanted.shape == (1, 32, 2, 4) and torch.equal(model.encode(picture).latents, wanted)
        assert torch.equal(model.encode(picture[:, :, None]).latents[:, :, 0], wanted)
        assert model.encode(picture[..., :32, :]).latents.shape == (1, 32, 2, 4)


def test_answers_to_every_name_that_pipelines_use():
    model = adapted(32, 32)
    with torch.no_grad():
        encoded = model.encode(torch.zeros(1, 3, 32, 32))
    for mode in ("sample", "argmax"):
        assert torch.equal(retrieve_latents(encoded, torch.Generator(), mode), encoded.latent)
    assert torch.equal(encoded.latents, encoded.latent)


@pytest.mark.parametrize("factor,channels,pack", [(32, 32, 2), (64, 128, 2), (32, 32, 4)])
def test_config_states_the_exposed_factor(factor, channels, pack):
    config = adapted(factor, channels, latent_pack=pack, block_out_channels=(1,)).config
    assert 2 ** (len(config.block_out_channels) - 1) == factor // pack
    assert config.shift_factor == 0.0 and config.scaling_factor == 0.4 and config.latent_channels == channels


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="latent_order"):
        adapted(32, 32, latent_order="c_middle")
    with pytest.raises(ValueError, match="does not divide"):
        adapted(32, 32, latent_pack=3)
    with pytest.raises(ValueError, match="latent channels"):
        adapted(32, 32).decode(torch.zeros(1, 16, 2, 2))


def test_saves_itself_and_loads_as_both_classes(tmp_path):
    model = adapted(32, 32, latent_order="c_last")
    model.save_pretrained(tmp_path)
    assert (tmp_path / f"{adapter.MODULE_NAME}.py").read_bytes() == Path(adapter.__file__).read_bytes()
    again = AutoencoderDCAdapter.from_pretrained(tmp_path)
    assert again.config.latent_order == "c_last" and again.config.block_out_channels == (8, 8, 16, 16, 32)
    stock = AutoencoderDC.from_pretrained(tmp_path)
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in again.state_dict().items())


def test_f128_tiles_keep_the_size():
    model = adapted(64, 128)
    assert model.tile_sample_stride_height == 448  # a multiple of 64: the stock tiles stay
    config = {**model.config, "encoder_block_out_channels": (8,) * 8, "decoder_block_out_channels": (8,) * 8}
    for side in ("encoder", "decoder"):
        config |= {f"{side}_layers_per_block": (1,) * 8, f"{side}_qkv_multiscales": ((),) * 8}
    deep = AutoencoderDCAdapter(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    deep.enable_tiling()
    with torch.no_grad():
        assert deep.decode(torch.zeros(1, 128, 9, 9)).sample.shape[-2:] == (9 * 128, 9 * 128)


@pytest.mark.parametrize("sizes", [(96, 96), (100, 130), (128, 64, 448, 448), (1, 1, 1, 1)])
def test_tiles_of_any_size_keep_the_picture_s(sizes):
    """diffusers keeps a stride of 448 px for a tile of 256 px, and returns a smaller picture."""
    model = adapted(32, 32)
    model.enable_tiling(*sizes)
    with torch.no_grad():
        assert model.decode(torch.zeros(1, 8, 10, 14)).sample.shape[-2:] == (5 * 32, 7 * 32)
        assert model.encode(torch.zeros(1, 3, 5 * 32, 7 * 32)).latent.shape == (1, 8, 10, 14)


def test_tiles_that_fit_are_those_of_diffusers():
    model, stock = adapted(32, 32), autoencoder_dc(32, 32)
    for sizes in ((), (256, 320, 192, 256)):
        for autoencoder in (model, stock):
            autoencoder.enable_tiling(*sizes)
        names = [f"tile_{kind}_{axis}" for kind in ("sample_min", "sample_stride") for axis in ("height", "width")]
        assert [getattr(model, name) for name in names] == [getattr(stock, name) for name in names]
