"""ComfyUI's 8-bit and 4-bit linears against an independent reader, and against the nearest value by brute force."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dcgen_convert.checkpoint import held, stream
from dcgen_convert.checkpoint.headers import read_header
from dcgen_convert.core.errors import InputError
from dcgen_convert.svdquant.comfyui import Float8Linear, Nvfp4Linear

from .comfyui_reader import e2m1, meaning


def written(weight: torch.Tensor, kind, folder) -> dict[str, torch.Tensor]:
    """The tensors that a linear of two stacked parts becomes in a file."""
    rows = len(weight) // 3
    save_file({"a": weight[:rows].clone(), "b": weight[rows:].clone()}, folder / "source.safetensors")
    entries = read_header(folder / "source.safetensors")[0]
    parts = tuple((held.Held(one, one.shape, one.dtype), 0, one.shape[0]) for one in (entries["a"], entries["b"]))
    linear = kind("block.lin", tuple(weight.shape), parts)
    stream.write(folder / "made.safetensors", linear.items())
    found = load_file(folder / "made.safetensors")
    true = weight.double().numpy()
    lost = ((meaning(found, "block.lin")[0] - true) ** 2).sum()
    assert np.allclose([linear.lost, linear.energy], [lost, (true**2).sum()], rtol=1e-3)
    return found


@pytest.mark.parametrize("kind", [Float8Linear, Nvfp4Linear])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_code_is_the_nearest_value_of_the_format(tmp_path, monkeypatch, kind, dtype):
    monkeypatch.setattr(held, "CHUNK", 4 * 80 * 7)  # seven rows at a time
    weight = (torch.randn(144, 80, generator=torch.Generator().manual_seed(1)) ** 3).to(dtype)
    weight[3, :16] = 0
    found = written(weight, kind, tmp_path)
    values, scales, table = meaning(found, "block.lin")
    true = weight.double().numpy()
    nearest = np.abs(true[..., None] - table * scales[..., None]).min(-1)
    assert np.abs(np.abs(true - values) - nearest).max() <= 1e-6 * np.abs(true).max()
    assert (values[3, :16] == 0).all()


def test_the_shapes_are_those_that_comfyui_reads(tmp_path):
    found = written(torch.randn(144, 80), Nvfp4Linear, tmp_path)
    assert {name.removeprefix("block.lin."): (str(x.dtype), tuple(x.shape)) for name, x in found.items()} == {
        "weight": ("torch.uint8", (144, 40)),
        "weight_scale": ("torch.float8_e4m3fn", (256, 8)),  # of (144, 5)
        "weight_scale_2": ("torch.float32", ()),
        "comfy_quant": ("torch.uint8", (len('{"format": "nvfp4"}'),)),
    }
    found = written(torch.randn(144, 80), Float8Linear, tmp_path)
    assert found["block.lin.weight_scale"].shape == () and found["block.lin.weight"].shape == (144, 80)
    conf = json.loads(found["block.lin.comfy_quant"].numpy().tobytes())
    assert conf == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


def test_fp8_uses_the_whole_range_and_nvfp4_searches_its_scales(tmp_path):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    found = written(weight, Float8Linear, tmp_path)
    assert found["block.lin.weight"].float().abs().max() == 448
    values = meaning(written(weight, Nvfp4Linear, tmp_path), "block.lin")[0]
    plain = weight.view(64, 4, 16).double().numpy()
    scale = np.abs(plain).max(-1, keepdims=True) / 6
    table = np.array([e2m1(code) for code in range(16)])
    by_largest = np.abs(plain[..., None] - table * scale[..., None]).min(-1)  # with scales that are not rounded at all
    error = weight.double().numpy() - values
    assert (error**2).sum() < (by_largest**2).sum()


def test_what_cannot_be_rounded(tmp_path):
    with pytest.raises(InputError, match="multiples of 16"):
        written(torch.randn(48, 40), Nvfp4Linear, tmp_path)
    for bad in (float("nan"), float("inf")):
        weight = torch.randn(48, 32)
        weight[40, 3] = bad
        with pytest.raises(InputError, match="NaN or infinite values in block.lin"):
            written(weight, Float8Linear, tmp_path)
        assert not (tmp_path / "made.safetensors").exists()
    assert (meaning(written(torch.zeros(48, 32), Float8Linear, tmp_path), "block.lin")[0] == 0).all()
