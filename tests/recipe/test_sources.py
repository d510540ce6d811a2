"""SOURCE may be a recipe, catalogue name, folder, .safetensors or hub id; each finds its recipe and its grid."""

import json

import diffusers
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from dcgen_convert import families
from dcgen_convert.core.errors import AccessError, InputError
from dcgen_convert.families import catalog, components
from dcgen_convert.families.grid import Grid
from dcgen_convert.ranks import machine
from dcgen_convert.recipe import geometry, loading, sources
from dcgen_convert.recipe.identity import Identity

FLUX = dict(
    in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A diffusers folder with a tiny FLUX and the config of an f8c16 VAE."""
    diffusers.FluxTransformer2DModel(**FLUX).save_pretrained(tmp_path / "my-flux" / "transformer")
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8], "latent_channels": 16}
    (tmp_path / "my-flux" / "vae").mkdir()
    (tmp_path / "my-flux" / "vae" / "config.json").write_text(json.dumps(vae))
    return tmp_path / "my-flux"


def test_a_folder_gets_its_familys_recipe(folder):
    resolved = loading.load(str(folder), flags={"ae": "dc-ae-f32"})
    assert (resolved.recipe.source, resolved.recipe.name) == (str(folder), "my-flux")
    assert resolved.origins["source"] == "argument SOURCE"
    assert resolved.origins["adapt.ema"] == "family default (recipe flux-dev)"
    assert resolved.identity.grid == Grid(8, 16, 2)


def test_a_recipe_may_be_given_for_a_folder(folder):
    resolved = loading.load(str(folder), recipe="tiny-flux")
    assert resolved.recipe.data.resolution == 128
    assert resolved.origins["data.resolution"] == "recipe tiny-flux"
    assert resolved.recipe.source == str(folder)


def test_a_single_file_gets_its_familys_recipe(tmp_path):
    model = diffusers.FluxTransformer2DModel(**FLUX)
    path = tmp_path / "mine.safetensors"
    save_file({f"transformer.{name}": value for name, value in model.state_dict().items()}, path)
    resolved = loading.load(str(path))
    assert (resolved.recipe.name, resolved.recipe.source) == ("mine", str(path))
    assert resolved.identity.grid == Grid(8, 16, 2)


def test_a_catalogue_name_and_its_hub_id_are_one_source():
    assert catalog.find_source("black-forest-labs/FLUX.1-dev") is catalog.SOURCES["flux-dev"]
    resolved = loading.load("black-forest-labs/FLUX.1-dev")
    assert resolved.recipe.source == "black-forest-labs/FLUX.1-dev"
    assert resolved.recipe.adapt == loading.load("flux-dev").recipe.adapt


def test_an_unknown_hub_id_cannot_be_resolved_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AccessError, match="not in the cache"):
        loading.load("somebody/some-model", machine=machine.Machine(offline=True))


def test_a_cached_hub_id_whose_network_is_a_unet(monkeypatch, tmp_path):
    """There is no transformer/config.json in such a repository."""
    home, commit = tmp_path / "models--somebody--some-unet", "0" * 40
    unet = home / "snapshots" / commit / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert sources.recipe_for(Identity("somebody/some-unet", offline=True), None) == ("sd-1.5", True)


@pytest.mark.parametrize(
    "word, text",
    [
        ("flux-kraa", "did you mean 'flux-krea'"),
        ("model.ckpt", "pickle"),
        ("./none", "no such file"),
        ("none.yaml", "recipe file not found"),
    ],
)
def test_words_that_are_no_source(word, text):
    with pytest.raises(InputError, match=text):
        loading.load(word)


def test_a_folder_without_config_or_of_another_class(tmp_path):
    with pytest.raises(InputError, match="no config found"):
        loading.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(InputError, match="UNet2DModel has no family"):
        loading.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        loading.load(str(tmp_path))


def test_an_autoencoder_folder_is_read_from_its_config(tmp_path):
    model = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=8, attention_head_dim=4,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (), ()), decoder_qkv_multiscales=((), (), (), (), ()),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "ae")
    assert geometry.new_grid(str(tmp_path / "ae")) == Grid(model.spatial_compression_ratio, 8, 1)
    latent = model.encode(torch.zeros(1, 3, 32, 32)).latent
    assert latent.shape == (1, 8, 2, 2)


@pytest.mark.parametrize(
    "name, grid", [("dc-ae-f32", (32, 32, 1)), ("dc-ae-f64", (64, 128, 1)), ("dc-ae-f128", (128, 512, 1))]
)
def test_aliases(name, grid):
    assert geometry.new_grid(name) == Grid(*grid)


def test_plain_aliases_mean_what_the_authors_used_for_flux():
    assert catalog.AUTOENCODERS["dc-ae-f32"].repo == "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"
    assert catalog.AUTOENCODERS["dc-ae-f64"].repo == "dc-ai/dc-ae-1.5-f64c128-diffusers"
    assert catalog.AUTOENCODERS["dc-ae-f32"].scaling_factor == 0.3189


@pytest.mark.parametrize("entry", catalog.SOURCES.values(), ids=lambda entry: entry.name)
def test_catalogue_entries_agree_with_families_and_recipes(entry):
    assert entry.family in families.FAMILIES
    own = loading.load(entry.recipe, complete=False).recipe.source  # two models may share a recipe
    assert own == entry.name or catalog.SOURCES[own].recipe == entry.recipe
    assert (entry.repo is None) != (entry.folder is None)
    if entry.config:
        config = entry.transformer_config()
        family = families.recognise(config, components.index_of(entry))
        assert family.name == entry.family
        assert family.patch(config, entry.vae_channels) == entry.patch
        assert hasattr(diffusers, config["_class_name"])
