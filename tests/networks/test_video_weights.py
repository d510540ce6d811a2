"""The published pickle of DC-AE-V: read by its SHA-256 alone, as tensors alone, and written as safetensors."""

import hashlib
import pickle
import re
from dataclasses import replace

import pytest
import torch

from dcgen_convert.api import order
from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.core.files import read_json, sha256, write_json
from dcgen_convert.families import catalog, deep_autoencoders
from dcgen_convert.families.grid import Grid, Time, autoencoder_grid
from dcgen_convert.networks import autoencoder_files, video_weights
from dcgen_convert.networks.autoencoder_dc_video import AutoencoderDCVideo
from dcgen_convert.networks.folder import load_folder
from dcgen_convert.recipe import geometry

VIDEOS = [alias for alias, entry in catalog.AUTOENCODERS.items() if entry.frames > 1 and not entry.folder]


def authors_name(name: str) -> str:
    """Our tensor name in the authors' checkpoints: what their published code calls its modules."""
    part, rest = name.split(".", 1)
    ends = {
        "encoder.conv_in.conv.": "project_in.conv.conv.",
        "encoder.conv_out.": "project_out.conv.",
        "decoder.conv_in.": "project_in.conv.",
        "decoder.norm_out.": "project_out.op_list.0.",
        "decoder.conv_out.conv.": "project_out.op_list.2.conv.conv.",
    }
    for ours, theirs in ends.items():
        if name.startswith(ours):
            return f"{part}.{name.replace(ours, theirs)}"
    _, stage, block, *inner = rest.split(".")
    kind = {"norm": "conv2.norm"}.get(inner[0], f"{inner[0]}.conv")
    return f"{part}.stages.{int(stage) + 1}.op_list.{block}.main.{kind}.{inner[1]}"


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def original(tmp_path):
    """(model, folder with its config.json, its tensors under the authors' names)."""
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(8, 16, 16, 32), layers_per_block=(1, 2, 1, 1))
    model = AutoencoderDCVideo(latent_channels=4, chunk_frames=8, scaling_factor=0.7241, **sizes)
    for value in model.parameters():
        torch.nn.init.normal_(value)
    folder = tmp_path / "config"
    folder.mkdir()
    config = {key: value for key, value in model.config.items() if key[0] != "_"}
    write_json(folder / "config.json", {"_class_name": "AutoencoderDCVideo", **config})
    return model, folder, {authors_name(name): value for name, value in model.state_dict().items()}


def packed(tmp_path, held) -> tuple[str, str]:
    """(path, SHA-256) of a pickle."""
    torch.save(held, tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt"), sha256(tmp_path / "weights.pt")


FORMS = {
    "state dict": lambda tensors: tensors,
    "training": lambda tensors: {"model_state_dict": tensors, "step": 3},
    "average": lambda tensors: {"model_state_dict": {}, "ema_model_state_dict": {0.999: tensors}},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_pickle_becomes_a_folder_of_safetensors(form, original, tmp_path):
    model, config, tensors = original
    file, digest = packed(tmp_path, form(tensors))
    name = f"{file}:{config}:{digest.upper()}"
    assert autoencoder_files.is_file(name) and geometry.new_grid(name) == Grid(8, 4, 1, Time(4))
    folder = autoencoder_files.folder_of_file(name, tmp_path / "work")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    again = load_folder(folder, "autoencoder", torch.float32)
    assert type(again) is AutoencoderDCVideo and again.config.latents_std == [1 / 0.7241] * 4
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("names", [authors_name, str])
def test_safetensors_of_it_need_no_hash(names, original, tmp_path):
    from safetensors.torch import save_file

    model, config, _ = original
    save_file({names(name): value for name, value in model.state_dict().items()}, tmp_path / "weights.safetensors")
    folder = autoencoder_files.folder_of_file(f"{tmp_path / 'weights.safetensors'}:{config}", tmp_path / "work")
    again = load_folder(folder, "autoencoder", torch.float32).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_without_a_hash_it_is_not_read(original, tmp_path, monkeypatch):
    _, config, tensors = original
    file, digest = packed(tmp_path, tensors)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    for which in (config, "dc-ae-v-f32t4c32"):
        with pytest.raises(InputError, match="only when its SHA-256 is stated") as caught:
            autoencoder_files.file_and_config(f"{file}:{which}")
        assert f"weights.pt:{which}:SHA256" in caught.value.hint
    other = hashlib.sha256(b"").hexdigest()
    with pytest.raises(InputError, match=f"has the SHA-256 {digest}, and not {other}"):
        autoencoder_files.folder_of_file(f"{file}:{config}:{other}", tmp_path / "work")
    assert not list((tmp_path / "work").rglob("*.safetensors"))


def test_the_catalogue_may_state_the_hash(original, tmp_path, monkeypatch):
    _, config, tensors = original
    file, digest = packed(tmp_path, tensors)
    entry = catalog.AUTOENCODERS["dc-ae-v-f32t4c32"]
    monkeypatch.setitem(catalog.AUTOENCODERS, entry.alias, replace(entry, sha256=digest))
    monkeypatch.setattr(deep_autoencoders, "config_of", lambda _: read_json(config / "config.json"))
    folder = autoencoder_files.folder_of_file(f"{file}:{entry.alias}", tmp_path / "work")
    assert load_folder(folder, "autoencoder", torch.float32).config.z_dim == 4


def test_code_in_the_pickle_does_not_run(original, tmp_path):
    _, config, tensors = original
    marker = tmp_path / "it ran"
    file, digest = packed(tmp_path, {**tensors, "more": Runs(marker)})
    with pytest.raises(InputError, match="does not hold tensors alone"):
        autoencoder_files.folder_of_file(f"{file}:{config}:{digest}", tmp_path / "work")
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(Runs(marker), protocol=2))  # the form before torch's archives
    with pytest.raises(InputError, match="does not hold tensors alone"):
        autoencoder_files.folder_of_file(f"{plain}:{config}:{sha256(plain)}", tmp_path / "work")
    assert not marker.exists()
    for odd in ([1, 2], {"a": 1}, {}):
        file, digest = packed(tmp_path, odd)
        with pytest.raises(InputError, match="holds no tensors by name"):
            video_weights.read_pickle(tmp_path / "weights.pt", digest)


@pytest.mark.parametrize("which", ["", ":dc-ae-f32-in", ":FOLDER"])
@pytest.mark.parametrize("stated", [False, True])
def test_other_pickles_stay_refused(which, stated, tmp_path):
    file, digest = packed(tmp_path, {"a": torch.zeros(1)})
    write_json(tmp_path / "config.json", {"_class_name": "AutoencoderDC"})
    name = f"{file}{which.replace('FOLDER', str(tmp_path))}" + f":{digest}" * stated
    with pytest.raises(InputError, match="pickle checkpoint, which is refused"):
        autoencoder_files.folder_of_file(name, tmp_path / "work")


def test_models_that_draw_pictures_refuse_it(original, tmp_path):
    file, digest = packed(tmp_path, {})
    for name in ("dc-ae-v-f32t4c32", f"{file}:dc-ae-v-f32t4c32:{digest}"):
        with pytest.raises(RecipeError, match="is for videos, and .*tiny-flux draws pictures"):
            order.resolve("tiny-flux", {"ae": name, "resolution": 128})


@pytest.mark.parametrize("alias", VIDEOS)
def test_an_alias_says_how_it_is_given(alias, tmp_path):
    assert autoencoder_files.is_file(alias) and catalog.find_autoencoder(alias).where == alias
    with pytest.raises(
        InputError, match=f"weights of {alias} are published as a pickle, which is not fetched"
    ) as caught:
        autoencoder_files.folder_of_file(alias, tmp_path)
    assert f"--ae FILE.pt:{alias}:SHA256" in caught.value.hint


@pytest.mark.parametrize("alias", VIDEOS)
def test_shipped_configs_have_the_published_sizes(alias):
    """Geometry and scale of the alias, parameters to 0.5 million."""
    entry = catalog.AUTOENCODERS[alias]
    config = autoencoder_files.published_config(alias)
    factor, frames, channels = map(int, re.fullmatch(r"dc-ae-v-f(\d+)t(\d+)c(\d+)", alias).groups())
    assert (entry.factor, entry.frames, entry.channels) == (factor, frames, channels)
    assert autoencoder_grid(config) == (factor, channels)
    with torch.device("meta"):
        model = AutoencoderDCVideo.from_config(config)
    assert model.config.latents_std == [1 / entry.scaling_factor] * channels
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(entry.parameters, abs=5e5)
    assert (model.config.scale_factor_temporal, model.config.scale_factor_spatial) == (frames, factor)


def test_the_wrong_sizes_are_named(original, tmp_path):
    file, digest = packed(tmp_path, original[2])
    with pytest.raises(InputError, match="holds decoder.conv_in.bias as .32,., its config asks for .1024,."):
        autoencoder_files.folder_of_file(f"{file}:dc-ae-v-f32t4c32:{digest}", tmp_path / "work")
