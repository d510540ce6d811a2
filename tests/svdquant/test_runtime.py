"""What we write, read by others: stock diffusers with its kernels replaced by an independent emulation, and our own
readers against it.
"""

import importlib
import importlib.machinery
import json
import shutil
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcgen_convert.core.console import NULL
from dcgen_convert.core.errors import CheckFailed, InputError
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.runtime import emulate, load_dequantised
from dcgen_convert.svdquant.settings import QuantSettings

from . import emulation
from .conftest import flux_call

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=["nvfp4", "int4"])
def bundle(request, flux, no_refits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / request.param
    quantize(flux.folder, folder, flux.targets, QuantSettings(precision=request.param), flux.calls, NULL)
    return SimpleNamespace(folder=folder, precision=request.param)


def layer_tensors(folder, target):
    return {
        name.rpartition(".")[2]: tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
        if name.rpartition(".")[0] == target
    }


def reference_weight(tensors, nvfp4):
    """R diag(1/s) wcscales wtscale + U D by index formulas."""
    weight = emulation.svdq_weight(tensors["qweight"], tensors["wscales"], nvfp4) / emulation.channels(
        tensors["smooth_factor"]
    )
    if nvfp4:
        weight = weight * emulation.channels(tensors["wcscales"])[:, None] * tensors["wtscale"].float()
    down, up = emulation.low_rank(tensors["proj_down"], tensors["proj_up"])
    return weight + up @ down


def test_dequantised_load_is_the_documented_expansion(bundle, flux):
    model = load_dequantised(bundle.folder, torch.float32)
    for target in flux.targets.svdq:
        tensors = layer_tensors(bundle.folder, target)
        layer = model.get_submodule(target)
        assert type(layer) is torch.nn.Linear
        wanted = reference_weight(tensors, bundle.precision == "nvfp4")
        assert torch.allclose(layer.weight, wanted, atol=1e-5 * wanted.abs().max())
        assert torch.equal(layer.bias, emulation.channels(tensors["bias"]))
    for target in flux.targets.awq:
        tensors = layer_tensors(bundle.folder, target)
        assert torch.equal(
            model.get_submodule(target).weight,
            emulation.awq_weight(tensors["qweight"], tensors["wscales"], tensors["wzeros"]),
        )
        assert torch.equal(model.get_submodule(target).bias, tensors["bias"].float())


def test_dequantised_weights_are_near_the_source(bundle, flux):
    model = load_dequantised(bundle.folder, torch.float32)
    for target in (*flux.targets.svdq, *flux.targets.awq):
        wanted = flux.model.get_submodule(target).weight
        assert (model.get_submodule(target).weight - wanted).norm() < 0.12 * wanted.norm()


@pytest.fixture
def stock_loader(monkeypatch):
    """diffusers' own nunchaku_lite loading with the CUDA check and the compiled operators replaced."""
    kernels = types.ModuleType("kernels")
    kernels.__spec__ = importlib.machinery.ModuleSpec("kernels", None)
    kernels.get_kernel = lambda *args, **kwargs: SimpleNamespace(ops=emulation.Ops())
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    from diffusers.quantizers.nunchaku import nunchaku_quantizer as stock

    monkeypatch.setattr(stock.NunchakuLiteQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr("diffusers.utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("diffusers.utils.is_kernels_version", lambda *args: True)
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    name = "diffusers.quantizers.nunchaku.utils"
    sys.modules.pop(name, None)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_stock_diffusers_loads_the_folder_and_agrees_with_our_emulation(bundle, flux, stock_loader):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(bundle.folder)
    assert {name for name, module in model.named_modules() if isinstance(module, stock_loader.SVDQW4A4Linear)} == set(
        flux.targets.svdq
    )
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    call = {name: tensor.to(torch.bfloat16) for name, tensor in flux_call(50).items()}
    with torch.no_grad():
        stock = model(**call).sample.float()
        ours = emulate(bundle.folder, torch.bfloat16)(**call).sample.float()
        dense = flux.model(**flux_call(50)).sample
    assert (ours - stock).norm() < 0.003 * stock.norm()  # same arithmetic; float32 sums differ in order
    assert (stock - dense).norm() < 0.1 * dense.norm()


def test_one_emulated_layer_equals_the_stock_layer(bundle, flux, stock_loader):
    target = flux.targets.svdq[3]
    tensors = layer_tensors(bundle.folder, target)
    nvfp4 = bundle.precision == "nvfp4"
    layer = stock_loader.SVDQW4A4Linear(
        128, tensors["qweight"].shape[0], 32, True, bundle.precision, 16 if nvfp4 else 64
    )
    layer.load_state_dict(tensors)
    x = torch.randn(3, 50, layer.in_features, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ours = emulate(bundle.folder).get_submodule(target)(x).float()
    theirs = layer(x).float()
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_emulation_stays_exact_in_a_half_model(bundle, flux):
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    full, halved = emulate(bundle.folder), emulate(bundle.folder).to(torch.bfloat16)
    for target in (flux.targets.svdq[0], flux.targets.awq[0]):
        assert torch.equal(full.get_submodule(target)(x), halved.get_submodule(target)(x))


def edited(bundle, tmp_path, change):
    folder = tmp_path / "edited"
    shutil.copytree(bundle.folder, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


LAYER = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda t: t.pop(f"{LAYER}.smooth_factor"), CheckFailed, f"{LAYER}: tensors.*smooth_factor"),
        (
            lambda t: t.update({f"{LAYER}.wscales": t[f"{LAYER}.wscales"].view(torch.uint8)}),
            CheckFailed,
            rf"{LAYER}.wscales is torch\.uint8",
        ),
        (
            lambda t: t.update({f"{LAYER}.proj_up": t[f"{LAYER}.proj_up"].float()}),
            CheckFailed,
            f"{LAYER}.proj_up is torch.float32",
        ),
        (lambda t: t[f"{LAYER}.bias"].fill_(float("nan")), CheckFailed, f"{LAYER}.bias holds NaN"),
        (lambda t: t.pop("proj_out.bias"), InputError, "proj_out.bias is missing"),
    ],
)
def test_damaged_folders_are_refused_by_name(bundle, tmp_path, change, error, message):
    folder = edited(bundle, tmp_path, change)
    with pytest.raises(error, match=message):
        load_dequantised(folder)


def test_a_dense_folder_is_refused(flux, tmp_path):
    with pytest.raises(InputError, match="not quantised in nunchaku_lite"):
        emulate(flux.folder)
    folder = tmp_path / "other"
    shutil.copytree(flux.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "NoSuchModel"}))
    with pytest.raises(InputError, match="NoSuchModel"):
        quantize(folder, tmp_path / "out", flux.targets, QuantSettings(), flux.calls, NULL)
