"""Hashes of single tensors against the safetensors library."""

import hashlib

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.checkpoint.tensors import tensor_sha256


def test_hashes_are_of_the_tensor_s_own_bytes(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(4).to(torch.float8_e4m3fn),
        "d": torch.zeros(()),
        "e": torch.zeros(0, 3),
    }
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    found = read_weights(tmp_path)
    with safe_open(tmp_path / "m.safetensors", "pt") as reader:
        assert set(found) == set(reader.keys())
        for name, entry in found.items():
            raw = reader.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert tensor_sha256(entry) == hashlib.sha256(raw).hexdigest()
