"""A bundle with the in-bundle adapter, loaded by other means than one plain `from_pretrained`: as stock classes are."""

import io
import pickle
import sys

import pytest
import torch
from diffusers import AutoModel, AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline
from diffusers import FluxImg2ImgPipeline as Img2Img

from dcgen_convert.bundle import autoencoder_dc_adapter as adapter
from dcgen_convert.core.files import read_json


def loaded(folder, kind=DiffusionPipeline, **options):
    return kind.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture
def pipe(bundles, monkeypatch):
    """The pipeline as a program has it that does not have this package: nothing has registered the class before."""
    monkeypatch.delitem(sys.modules, adapter.MODULE_NAME, raising=False)
    return loaded(bundles("flux"))


def same(one, other):
    return {**one, "_name_or_path": ""} == {**other, "_name_or_path": ""}


def given(pipe):
    return {name: part for name, part in pipe.components.items() if part is not None}


WAYS = {
    "its own autoencoder": lambda folder, pipe: loaded(folder, vae=pipe.vae),
    "an autoencoder of this package": lambda folder, pipe: loaded(
        folder, vae=adapter.AutoencoderDCAdapter.from_pretrained(str(folder / "vae"))
    ),
    "device map": lambda folder, pipe: loaded(folder, vae=pipe.vae, device_map="balanced"),
    "every part": lambda folder, pipe: loaded(folder, Img2Img, **given(pipe)),
    "parts alone": lambda _, pipe: Img2Img(**given(pipe)),
    "another task of the pipeline": lambda _, pipe: AutoPipelineForImage2Image.from_pipe(pipe),
    "the pipeline by its task": lambda folder, _: loaded(folder, AutoPipelineForText2Image),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_autoencoder_is_taken(bundles, pipe, way):
    again = way(bundles("flux"), pipe)
    assert same(again.vae.config, pipe.vae.config) and type(again.vae).__name__ == adapter.CLASS_NAME
    assert again.vae_scale_factor == pipe.vae_scale_factor


def test_a_class_is_found_by_the_config_alone(bundles):
    folder = bundles("flux") / "vae"
    module, name = read_json(folder / "config.json")["auto_map"]["AutoModel"].split(".")
    assert (folder / f"{module}.py").is_file() and name == adapter.CLASS_NAME
    assert type(loaded(str(folder), AutoModel)).__name__ == name


def test_each_load_gives_the_same_class(bundles, pipe):
    assert type(loaded(bundles("flux")).vae) is type(pipe.vae)


@pytest.mark.parametrize("pack", ["pickle", "torch"])
def test_a_packed_autoencoder_comes_back(bundles, pipe, pack):
    loaded(bundles("flux"))  # diffusers runs the file again, and the first pipeline must not lose its class
    if pack == "pickle":
        again = pickle.loads(pickle.dumps(pipe.vae))
    else:
        buffer = io.BytesIO()
        torch.save(pipe.vae, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert again.config == pipe.vae.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in pipe.vae.state_dict().items())


def test_a_saved_pipeline_is_a_bundle_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert read_json(tmp_path / "model_index.json")["vae"] == [adapter.MODULE_NAME, adapter.CLASS_NAME]
    assert loaded(tmp_path).vae.config.auto_map == pipe.vae.config.auto_map
