"""Header reading against the safetensors library, and every kind of damage refused in one sentence."""

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
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
    with pytest.raises(InputError, match="no file of its folder"):
        read_weights(tmp_path)


def overlap(header, body):
    header["b"]["data_offsets"] = [8, 16]
    return header, body


def gap_before(header, body):
    for entry in header.values():
        entry["data_offsets"] = [offset + 16 for offset in entry["data_offsets"]]
    return header, bytes(16) + body


def gap_between(header, body):
    header["b"]["data_offsets"] = [offset + 8 for offset in header["b"]["data_offsets"]]
    return header, body + bytes(8)


def trailing(header, body):
    return header, body + b"abc"


@pytest.mark.parametrize(
    "damage, says",
    [
        (overlap, "a lies on bytes of b"),
        (gap_before, "16 bytes between the header and s belong to no tensor"),
        (gap_between, "8 bytes between a and b belong to no tensor"),
        (trailing, "3 bytes after b belong to no tensor"),
    ],
)
def test_tensors_cover_the_file_exactly(file, damage, says):
    """As the library asks it: a file with these faults does not load there either."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = damage(json.loads(data[8 : 8 + length]), data[8 + length :])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(SafetensorError), safe_open(file, framework="pt"):
        pass
    with pytest.raises(InputError, match=says):
        read_header(file)


def test_a_tensor_that_is_named_twice_is_refused(file):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(text)["a"])
    text = text[:-1] + f',"a":{entry}}}'.encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(InputError, match="it names a twice"):
        read_header(file)


def test_a_pointer_of_git_lfs_is_named(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(InputError, match="is a pointer of Git LFS"):
        read_header(file)


def test_an_index_of_lost_shards_is_left_out(tmp_path, file):
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert read_weights(tmp_path).keys() == {"a", "b", "s"}


def test_sources_that_are_none(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_source("x", "no-such-thing")
    with pytest.raises(InputError, match=r"model_index.json"):
        load_source("x", str(tmp_path))
    with pytest.raises(AccessError, match="local cache"):
        load_source("x", "nobody/nothing", offline=True)
