"""The classic single file says the same weights as the diffusers folder, in the order its kernels want."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import InputError
from dcgen_convert.svdquant.nunchaku import GELU_SHIFT, export_nunchaku
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.runtime import load_dequantised
from dcgen_convert.svdquant.settings import QuantSettings

from . import emulation


@pytest.fixture(scope="module", params=["nvfp4", "int4"])
def classic(request, flux, no_refits, tmp_path_factory):
    root = tmp_path_factory.mktemp("classic")
    settings = QuantSettings(precision=request.param, fuse_qkv=True)
    quantize(flux.folder, root / "transformer", flux.targets, settings, flux.calls, NULL)
    export_nunchaku(root / "transformer", root / "one.safetensors", patch=1)
    model = load_dequantised(root / "transformer", torch.float32)
    tensors = load_file(root / "one.safetensors")
    return SimpleNamespace(root=root, fp4=request.param == "nvfp4", tensors=tensors, model=model)


def residual(classic, name):
    """R diag(1/s), float32 (N, K), by index formulas."""
    part = {key.rpartition(".")[2]: t for key, t in classic.tensors.items() if key.rpartition(".")[0] == name}
    weight = emulation.svdq_weight(part["qweight"], part["wscales"], classic.fp4) / emulation.channels(part["smooth"])
    return weight * part["wtscale"].float() if classic.fp4 else weight


def dense(classic, name):
    down, up = emulation.low_rank(classic.tensors[f"{name}.lora_down"], classic.tensors[f"{name}.lora_up"])
    return residual(classic, name) + up @ down


def bias(classic, name):
    return emulation.channels(classic.tensors[f"{name}.bias"])


@pytest.mark.parametrize(
    "name, parts",
    [
        ("transformer_blocks.0.qkv_proj", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("transformer_blocks.0.qkv_proj_context", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
        ("transformer_blocks.0.out_proj_context", ["attn.to_add_out"]),
        ("transformer_blocks.0.mlp_context_fc1", ["ff_context.net.0.proj"]),
        ("transformer_blocks.0.mlp_fc2", ["ff.net.2"]),
        ("single_transformer_blocks.0.qkv_proj", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("single_transformer_blocks.0.mlp_fc1", ["proj_mlp"]),
    ],
)
def test_fused_rows_are_the_stock_layers(classic, name, parts):
    block = classic.model.get_submodule(".".join(name.split(".")[:2]))
    stock = [block.get_submodule(part) for part in parts]
    wanted = torch.cat([layer.weight for layer in stock])
    assert torch.allclose(dense(classic, name), wanted, atol=1e-5 * wanted.abs().max())
    biases = torch.cat([layer.bias for layer in stock])
    if name.endswith("fc2") and not classic.fp4:  # shifted input: R (x + c) / s + bias' = R x / s + bias
        assert torch.allclose(bias(classic, name) + residual(classic, name).sum(1) * GELU_SHIFT, biases, atol=2e-2)
        assert not torch.equal(bias(classic, name), biases)
    else:
        assert torch.equal(bias(classic, name), biases)


def test_proj_out_is_cut_along_its_inputs(classic):
    block = "single_transformer_blocks.0"
    stock = classic.model.get_submodule(f"{block}.proj_out")
    together = torch.cat([dense(classic, f"{block}.out_proj"), dense(classic, f"{block}.mlp_fc2")], 1)
    assert torch.allclose(together, stock.weight, atol=1e-5 * stock.weight.abs().max())
    assert bias(classic, f"{block}.out_proj").abs().max() == 0
    if classic.fp4:
        assert torch.equal(bias(classic, f"{block}.mlp_fc2"), stock.bias)


@pytest.mark.parametrize(
    "name, splits, scales",
    [("transformer_blocks.0.norm1.linear", 6, (1, 4)), ("single_transformer_blocks.0.norm.linear", 3, (1,))],
)
def test_modulation_rows_are_interleaved_with_one_added_to_scales(classic, name, splits, scales):
    got = {part: classic.tensors[f"{name}.{part}"] for part in ("qweight", "wscales", "wzeros", "bias")}
    weight = emulation.awq_weight(got["qweight"], got["wscales"], got["wzeros"])
    stock = classic.model.get_submodule(name)
    width = stock.out_features // splits
    for split in range(splits):
        for channel in (0, 1, width - 1):
            row, wanted = channel * splits + split, split * width + channel
            assert torch.equal(weight[row], stock.weight[wanted])
            one = 1.0 if split in scales else 0.0
            assert got["bias"][row].float().item() == pytest.approx(stock.bias[wanted].item() + one, abs=4e-3)


def test_names_and_metadata(classic, flux):
    names = set(classic.tensors)
    assert "transformer_blocks.0.norm_added_q.weight" in names and "single_transformer_blocks.0.norm_k.weight" in names
    assert "x_embedder.weight" in names and not any(".attn." in name or "wcscales" in name for name in names)
    with safe_open(classic.root / "one.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == json.loads((flux.folder / "config.json").read_text())
    method = json.loads(metadata["quantization_config"])
    assert method["weight"]["dtype"] == ("fp4_e2m1_all" if classic.fp4 else "int4") and method["rank"] == 32
    assert metadata["model_class"] == "NunchakuFluxTransformer2dModel"
    assert json.loads(metadata["comfy_config"])["model_config"]["in_channels"] == 32


def test_the_file_is_the_same_every_time(classic):
    export_nunchaku(classic.root / "transformer", classic.root / "again.safetensors", patch=1)
    assert (classic.root / "again.safetensors").read_bytes() == (classic.root / "one.safetensors").read_bytes()


def test_layers_quantised_apart_cannot_be_fused(flux, no_refits, tmp_path):
    quantize(flux.folder, tmp_path / "transformer", flux.targets, QuantSettings(), flux.calls, NULL)
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.qkv_proj cannot be fused"):
        export_nunchaku(tmp_path / "transformer", tmp_path / "one.safetensors", patch=1)
    assert not (tmp_path / "one.safetensors").exists()
