"""Text encoders and tokenizers that transformers would load with random weights or without words are errors."""

import json
import shutil

import pytest
import torch
from conftest import WEIGHTS
from safetensors.torch import load_file, save_file

from dcgen_convert.bundle.checks import check_parts
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.errors import InputError, ResourceError
from dcgen_convert.networks import parts, pipelines

INDEX = json.loads((WEIGHTS / "tiny-flux" / "model_index.json").read_text())
MODEL = "text_encoder/model.safetensors"


@pytest.fixture
def flux(tmp_path):
    return shutil.copytree(WEIGHTS / "tiny-flux", tmp_path / "flux")


def renamed(root):
    save_file({f"model.{name}": value for name, value in load_file(root / MODEL).items()}, root / MODEL)


def one_more(root):
    tensors = load_file(root / MODEL)
    save_file({**tensors, "extra.weight": tensors["final_layer_norm.weight"].clone()}, root / MODEL)


def one_less(root):
    tensors = load_file(root / MODEL)
    del tensors["final_layer_norm.weight"]
    save_file(tensors, root / MODEL)


def of_another_shape(root):
    edit(root / "text_encoder" / "config.json", hidden_size=32)


def fewer_layers(root):
    edit(root / "text_encoder_2" / "config.json", num_layers=1)


def without_vocabulary(root):
    (root / "tokenizer_2" / "tokenizer.json").unlink()


def with_a_cut_vocabulary(root):
    path = root / "tokenizer_2" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"] = document["model"]["vocab"][:4]
    path.write_text(json.dumps(document))


def with_a_damaged_vocabulary(root):
    (root / "tokenizer" / "tokenizer.json").write_text("{")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_whole_parts_are_accepted(flux):
    parts.check(flux, INDEX)
    assert check_parts(flux, INDEX) == []


@pytest.mark.parametrize(
    "damage, says",
    [
        (renamed, "text_encoder lacks 36 tensors of its CLIPTextModel, which would be random"),
        (one_more, "text_encoder has 1 tensors that its CLIPTextModel does not ask for: extra.weight"),
        (one_less, "lacks 1 tensors of its CLIPTextModel, which would be random: final_layer_norm.weight"),
        (of_another_shape, "text_encoder does not load"),
        (fewer_layers, r"text_encoder_2 has 9 tensors .*encoder\.block\.1\."),
        (without_vocabulary, "tokenizer_2 knows no words"),
        (with_a_cut_vocabulary, "tokenizer_2 knows no words"),
        (with_a_damaged_vocabulary, "tokenizer does not load"),
    ],
)
def test_parts_that_would_be_random_or_wordless(flux, damage, says):
    damage(flux)
    with pytest.raises(InputError, match=says):
        parts.check(flux, INDEX)
    assert len(check_parts(flux, INDEX)) == 1


@pytest.mark.parametrize("version, old", [("5.7.3", True), ("4.57.0", True), ("5.8.0", False), ("6.0.0.dev0", False)])
def test_an_old_transformers_is_refused(version, old):
    if not old:
        parts.require_version(version)
        return
    with pytest.raises(ResourceError, match=f"transformers {version} is too old"):
        parts.require_version(version)


def test_a_pipeline_without_one_of_its_text_encoders_is_refused(flux):
    edit(flux / "model_index.json", text_encoder_2=[None, None], tokenizer_2=[None, None])
    source = load_source("x", str(flux))
    with pytest.raises(InputError, match="x has no text_encoder_2 and no tokenizer_2, which a FluxPipeline draws with"):
        pipelines.load_text_encoders(source, torch.float32)
    pipelines.require_parts(source, given=("text_encoder_2", "tokenizer_2"))
