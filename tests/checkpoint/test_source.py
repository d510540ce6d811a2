"""A pipeline folder as a source: its config and its weights agree, and every file that matters is in its contents."""

import json
import os
import shutil

import pytest
import torch
from conftest import WEIGHTS
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from dcgen_convert.checkpoint import source as sources
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.errors import InputError
from dcgen_convert.families import legacy

FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def flux(tmp_path):
    return shutil.copytree(WEIGHTS / "tiny-flux", tmp_path / "flux")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(path, change):
    save_file(change(load_file(path)), path, {"format": "pt"})


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"guidance_embeds": False}, "has too many: 4 tensors .*guidance_embedder"),
        ({"num_layers": 1}, r"has too many: 32 tensors .*transformer_blocks\.1\."),
        ({"num_layers": 3}, r"lacks 32 tensors .*transformer_blocks\.2\."),
        ({"pooled_projection_dim": 32}, r"its config asks for \[128, 32\]"),
    ],
)
def test_a_config_that_asks_for_other_weights_is_refused(flux, changes, says):
    edit(flux / "transformer" / "config.json", **changes)
    with pytest.raises(InputError, match=says):
        load_source("x", str(flux))


def test_integer_weights_of_a_folder_are_refused(flux, tmp_path):
    name = "transformer_blocks.0.attn.to_q.weight"
    retensor(flux / FILE, lambda found: {**found, name: found[name].to(torch.int8), f"{name}_scale": torch.ones(1)})
    with pytest.raises(InputError, match=r"to_q.weight as I8, which is no floating-point weight"):
        load_source("x", str(flux), home=tmp_path / "import")


def test_a_network_of_an_older_class_is_todays(tmp_path):
    """As the published DiT folders are; diffusers gives the class by norm_type too."""
    dit = shutil.copytree(WEIGHTS / "tiny-dit", tmp_path / "dit")
    today = load_source("x", str(dit)).config
    old = {
        "_class_name": legacy.CLASS,
        "cross_attention_dim": None,
        "num_vector_embeds": None,
        "_name_or_path": "/home",
    }
    edit(dit / "transformer" / "config.json", **old)
    assert load_source("x", str(dit)).config == today


def test_a_tensor_that_the_network_has_no_use_for_is_left_out(tmp_path):
    dit = shutil.copytree(WEIGHTS / "tiny-dit", tmp_path / "dit")
    before = load_source("x", str(dit)).tensors.keys()
    retensor(dit / FILE, lambda found: {**found, "pos_embed.pos_embed": torch.zeros(1, 64, 128)})
    source = load_source("x", str(dit), home=tmp_path / "import")
    assert source.imported and source.single.shapes.keys() == before


def test_contents_follow_the_bytes_and_nothing_else(flux, tmp_path):
    before = load_source("x", str(flux)).contents()
    parts = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
    assert {name.partition("/")[0] for name in before} == {"model_index.json", *parts}
    moved = flux.rename(tmp_path / "moved")
    for path in moved.rglob("*"):
        os.utime(path, (0, 0))
    (moved / "notes.md").write_text("mine")
    assert load_source("x", str(moved)).contents() == before
    for name in before:
        path, times = moved / name, (moved / name).stat()
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b" " if path.suffix == ".json" else whole[:-1] + bytes([whole[-1] ^ 1]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        after = load_source("x", str(moved)).contents()
        assert [key for key in before if after[key] != before[key]] == [name]
        path.write_bytes(whole)


def test_contents_are_read_once_and_told(flux):
    source, told = load_source("x", str(flux)), []
    found = source.contents(told.append)
    assert sum(told) == sum(path.stat().st_size for path in source.content_files.values()) and len(told) == len(found)
    (flux / FILE).unlink()
    assert source.contents(told.append) == found and len(told) == len(found)


def test_what_a_download_must_fetch():
    wanted = [
        "tokenizer/chat_template.jinja",
        "tokenizer/qwen.tiktoken",
        "tokenizer/merges.txt",
        "NOTICE",
        "LICENSE.md",
    ]
    for patterns in (sources.WHOLE, sources.COMPLETING):
        assert list(filter_repo_objects(wanted, allow_patterns=patterns)) == wanted
