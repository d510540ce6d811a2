"""Reading a quantised transformer folder back on a machine without the kernels, from the files alone.

`load_dequantised` expands the weights; `emulate` also quantises activations as the kernels do, for honest quality
numbers. T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dcgen_convert.checkpoint.headers import Entry
from dcgen_convert.checkpoint.tensors import read_tensor
from dcgen_convert.core.errors import InputError
from dcgen_convert.svdquant.activation import quantize_activation, quantize_scaled
from dcgen_convert.svdquant.awq import AwqLinear
from dcgen_convert.svdquant.formats import round_bf16
from dcgen_convert.svdquant.forms import BFL, NUNCHAKU_LITE
from dcgen_convert.svdquant.layer import SvdqLinear
from dcgen_convert.svdquant.linears import UnpackedLayer, kinds
from dcgen_convert.svdquant.plain import PlainLinear
from dcgen_convert.svdquant.skeleton import build
from dcgen_convert.svdquant.source import read_folder
from dcgen_convert.svdquant.tensors import check_tensors


class _Emulation(nn.Module):
    """Moves with the model but stays float32: its buffers emulate 4-bit arithmetic, they are not weights."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Emulation:
        super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)
        return self


class EmulatedSvdq(_Emulation):
    """A W4A4 linear with the kernel's roundings (nunchaku's file format): bfloat16 in and out of every step, float32
    inside.

    Takes and returns any floating dtype; inputs are rounded to bfloat16 first.
    """

    smooth: torch.Tensor
    row_scale: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def __init__(self, layer: SvdqLinear, row_scale: torch.Tensor) -> None:
        super().__init__()
        self.precision = layer.quantised.precision
        self.in_features, self.out_features = layer.down.shape[1], layer.up.shape[0]
        for name, tensor in {
            "weight": layer.quantised.dequantise(),
            "smooth": layer.smooth,
            "row_scale": row_scale,
            "up": layer.up.float(),
            "down": layer.down.float(),
            "bias": None if layer.bias is None else layer.bias.float(),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = round_bf16(x.reshape(-1, x.shape[-1]))  # (T, K)
        y = round_bf16(quantize_activation(tokens, self.smooth, self.precision) @ self.weight.T)
        if self.precision == "nvfp4" or self.bias is not None:
            y = y * self.row_scale
            y = round_bf16(y if self.bias is None else y + self.bias)
        y = round_bf16(y + round_bf16(tokens @ self.down.T) @ self.up.T)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


class EmulatedPlain(_Emulation):
    """A plain NVFP4 linear as diffusers' `bfl` computes it with FlashInfer: bfloat16 in and out, float32 inside."""

    def __init__(self, layer: PlainLinear) -> None:
        super().__init__()
        self.input_scale = layer.input_scale
        self.out_features, self.in_features = layer.quantised.grid.shape
        self.register_buffer("weight", layer.dense(), persistent=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = round_bf16(quantize_scaled(x, self.input_scale) @ self.weight.T)
        return (y if self.bias is None else round_bf16(y + self.bias)).to(x.dtype)


class EmulatedAwq(_Emulation):
    """A W4A16 linear: the dequantised weight in bfloat16, products summed in float32."""

    def __init__(self, layer: AwqLinear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.codes.shape
        self.register_buffer("weight", layer.dense(), persistent=False)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = round_bf16(round_bf16(x) @ self.weight.T)
        return (y if self.bias is None else round_bf16(y + self.bias)).to(x.dtype)


def load_dequantised(folder: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The stock diffusers model with every 4-bit weight expanded to dense: R diag(1/s) wcscales wtscale + U D;
    activations are not quantised.

    Errors: InputError when the folder is not in one of our 4-bit forms; CheckFailed naming a layer whose tensors are
    incomplete or misshapen.
    """
    model, entries, layers = open_layers(folder)
    state = {}
    for name, layer in layers.items():
        weight = _expand(*layer) if isinstance(layer, tuple) else layer.dense()
        bias = layer[0].bias if isinstance(layer, tuple) else layer.bias
        state[f"{name}.weight"] = weight.to(dtype)
        if bias is not None:
            state[f"{name}.bias"] = bias.to(dtype)
    return _fill(model, entries, state, dtype)


def emulate(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The stock diffusers model whose target linears are replaced by emulations of the W4A4 and W4A16 kernels. Errors
    as `load_dequantised`.
    """
    model, entries, layers = open_layers(folder)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _emulation(layer))
    return _fill(model, entries, {}, dtype)


def _emulation(layer: UnpackedLayer) -> _Emulation:
    if isinstance(layer, tuple):
        return EmulatedSvdq(*layer)
    return EmulatedAwq(layer) if isinstance(layer, AwqLinear) else EmulatedPlain(layer)


def _expand(layer: SvdqLinear, row_scale: torch.Tensor) -> torch.Tensor:
    """W (N, K) float32; the row scale multiplies the 4-bit part only."""
    return layer.quantised.dequantise() / layer.smooth * row_scale[:, None] + layer.up.float() @ layer.down.float()


def open_layers(folder: Path) -> tuple[nn.Module, dict[str, Entry], dict[str, UnpackedLayer]]:
    """(model without weights, dense entries, quantised layers by module path)."""
    config, entries = read_folder(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (NUNCHAKU_LITE, BFL):
        raise InputError(f"{folder} is not quantised in {NUNCHAKU_LITE} or {BFL} form.", hint="Load it with diffusers.")
    model = build(config)
    modules = dict(model.named_modules())
    layers: dict[str, UnpackedLayer] = {}
    for name, kind in kinds(config, entries).items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"{folder} holds {name} as quantised, which is no linear of the model.")
        shape, bias = (linear.out_features, linear.in_features), linear.bias is not None
        mine = [key for key in entries if key.rpartition(".")[0] == name]
        tensors = {key.rpartition(".")[2]: read_tensor(entries.pop(key)) for key in mine}
        check_tensors(name, tensors, kind.spec(shape, bias))
        layers[name] = kind.unpack(tensors)
    return model, entries, layers


def _fill(model: nn.Module, entries: dict[str, Entry], state: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """Load dense entries (floating ones as `dtype`) and `state`; every parameter must be there, and nothing else."""
    for name, entry in entries.items():
        tensor = read_tensor(entry)
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    wanted = model.state_dict().keys()
    if wanted != state.keys():
        odd = sorted(wanted ^ state.keys())
        raise InputError(
            f"The folder's tensors do not fit its config.json: {odd[0]} is missing or unexpected ({len(odd)} in all)."
        )
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()
