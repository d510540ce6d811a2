"""Header reading against the safetensors library, and every kind of damage refused in one sentence."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dcgen_convert.checkpoint.headers import read_header, read_weights
from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.errors import AccessError, InputError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(
        {
            "a": torch.arange(6.0).reshape(2, 3),
            "b": torch.ones(4, dtype=torch.bfloat16),
            "s": torch.tensor(1, dtype=torch.int64),
        },
        path,
    )
    return path


def test_entries_are_the_librarys(file):
    entries, _ = read_header(file)
    data = file.read_bytes()
    with safe_open(file, framework="pt") as reference:
        assert set(entries) == set(reference.keys())
        for name, entry in entries.items():
            tensor = reference.get_tensor(name)
            assert entry.shape == tuple(tensor.shape)
            assert data[entry.start : entry.end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("keep", [0, 3, 8, 40, -1])
def test_truncated_files_are_refused(file, keep):
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(InputError, match=r"truncated|damaged"):
        read_header(file)


def test_header_that_contradicts_its_shapes_is_refused(file):
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"shape":[2,3]', b'"shape":[2,9]'))
    with pytest.raises(InputError, match="damaged safetensors header: a says F32"):
        read_header(file)


def test_pickles_are_refused(tmp_path):
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="pickle"):
        read_weights(tmp_path)
    with pytest.raises(InputError, match="pickle"):
        read_header(tmp_path / "diffusion_pytorch_model.bin")


def test_missing_shard_and_disagreeing_index_are_refused(tmp_path, file):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": file.name, "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(InputError, match=r"names the shard .*00002.* missing"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": file.name, "b": file.name, "zz": file.name, "s": file.name}}))
    with pytest.raises(InputError, match="disagree on 1 tensors, first zz"):
        read_weights(tmp_path)


def test_index_must_not_leave_its_folder(tmp_path, file):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": f"../{tmp_path.name}/{file.name}"}}))
    with pytest.raises(InputError, match="missing"):
        read_weights(tmp_path)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_source("x", "no-such-thing")
    with pytest.raises(InputError, match=r"model_index.json"):
        load_source("x", str(tmp_path))
    with pytest.raises(AccessError, match="local cache"):
        load_source("x", "nobody/nothing", offline=True)
