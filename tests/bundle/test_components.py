"""Copying hub folders with pickles, precision variants and links."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dcgen_convert.checkpoint.components import check_component, copy_component, plan_copy
from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.core.files import sha256


def weights(path, value=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.full((4,), value)}, path)


def test_pickles_and_variants_stay_behind(tmp_path):
    source = tmp_path / "unet"
    weights(source / "model.safetensors")
    weights(source / "model.fp16.safetensors", 2.0)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"):
        (source / name).write_text("{}")
    (source / "config.json").write_text("{}")
    hashes = copy_component(source, tmp_path / "out", NULL, label="unet")
    assert set(hashes) == {"config.json", "model.safetensors"} == {path.name for path in (tmp_path / "out").iterdir()}
    assert all(sha256(tmp_path / "out" / name) == digest for name, digest in hashes.items())


def test_a_lone_variant_gets_the_plain_name_and_a_true_index(tmp_path):
    source = tmp_path / "text_encoder"
    for i in (1, 2):
        weights(source / f"model.bf16-0000{i}-of-00002.safetensors", i)
    index = {
        "metadata": {},
        "weight_map": {"a": "model.bf16-00001-of-00002.safetensors", "b": "model.bf16-00002-of-00002.safetensors"},
    }
    (source / "model.safetensors.index.bf16.json").write_text(json.dumps(index))
    hashes = copy_component(source, tmp_path / "out", NULL, label="text_encoder")
    assert set(hashes) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(written["weight_map"].values()) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert all(sha256(tmp_path / "out" / name) == digest for name, digest in hashes.items())


@pytest.mark.parametrize(
    "shards, index",
    [
        ("model-0000{}-of-00002.fp16.safetensors", "model.safetensors.index.fp16.json"),
        ("model.fp16-0000{}-of-00002.safetensors", "model.fp16.safetensors.index.json"),
    ],
)
def test_variants_as_older_versions_named_them(tmp_path, shards, index):
    for number in (1, 2):
        weights(tmp_path / "in" / shards.format(number))
    document = {"weight_map": {"a": shards.format(1), "b": shards.format(2)}}
    (tmp_path / "in" / index).write_text(json.dumps(document))
    copy_component(tmp_path / "in", tmp_path / "out", NULL, label="vae")
    plain = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*plain, "model.safetensors.index.json"]
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert list(written["weight_map"].values()) == plain


def test_paths_of_the_machine_where_it_was_saved_stay_behind(tmp_path):
    weights(tmp_path / "in" / "model.safetensors")
    config = {"_name_or_path": "/home/me/model", "text_config": {"_name_or_path": "/home/me", "size": 2}, "size": 3}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    hashes = copy_component(tmp_path / "in", tmp_path / "out", NULL, label="text_encoder")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"text_config": {"size": 2}, "size": 3}
    assert hashes["config.json"] == sha256(tmp_path / "out" / "config.json")


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", r"tokenizer.json is a pointer of Git LFS"),
        ("config.json", b"\xef\xbb\xbf{}", r"config.json begins with a byte order mark"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", r"safetensors is a pointer of Git LFS"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../../b.safetensors"}}', "no file of its folder"),
    ],
)
def test_components_that_cannot_be_read(tmp_path, name, content, says):
    weights(tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        check_component(tmp_path)


def test_links_are_followed(tmp_path):
    weights(tmp_path / "blobs" / "abc")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    copy_component(tmp_path / "snapshot", tmp_path / "out", NULL, label="vae")
    copy = tmp_path / "out" / "model.safetensors"
    assert not copy.is_symlink() and sha256(copy) == sha256(tmp_path / "blobs" / "abc")


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        plan_copy(tmp_path / "none")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "pytorch_model.bin").write_text("x")
    with pytest.raises(InputError, match="is a pickle"):
        plan_copy(tmp_path / "p")
    for variant in ("fp16", "bf16"):
        weights(tmp_path / "v" / f"model.{variant}.safetensors")
    with pytest.raises(InputError, match="variants bf16, fp16"):
        plan_copy(tmp_path / "v")
