"""From a decomposition to the tensors of a checkpoint (nunchaku's file format), and back. The names are those of
diffusers' nunchaku_lite.
"""

import torch

from dcgen_convert.core.errors import CheckFailed
from dcgen_convert.svdquant import pack
from dcgen_convert.svdquant.awq import AwqLinear
from dcgen_convert.svdquant.layer import SvdqLinear
from dcgen_convert.svdquant.plain import PlainLinear, unpack_plain
from dcgen_convert.svdquant.settings import AWQ_GROUP, GROUP
from dcgen_convert.svdquant.weights import QuantWeight

Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Layer = SvdqLinear | AwqLinear | PlainLinear
HALF = torch.bfloat16


def svdq_spec(shape: tuple[int, int], precision: str, rank: int, bias: bool) -> Spec:
    """Name -> (dtype, shape) of every tensor of a W4A4 layer with weight shape (N, K)."""
    n, k = shape
    scales = torch.float8_e4m3fn if precision == "nvfp4" else HALF
    spec = {
        "qweight": (torch.int8, (n, k // 2)),
        "wscales": (scales, (k // GROUP[precision], n)),
        "smooth_factor": (HALF, (k,)),
        "proj_down": (HALF, (k, rank)),
        "proj_up": (HALF, (n, rank)),
    }
    if precision == "nvfp4":
        spec |= {"wcscales": (HALF, (n,)), "wtscale": (HALF, (1,))}
    return spec | ({"bias": (HALF, (n,))} if bias else {})


def awq_spec(shape: tuple[int, int], bias: bool) -> Spec:
    """Name -> (dtype, shape) of every tensor of a W4A16 layer with weight shape (N, K)."""
    n, k = shape
    spec = {
        "qweight": (torch.int32, (n // 4, k // 2)),
        "wscales": (HALF, (k // AWQ_GROUP, n)),
        "wzeros": (HALF, (k // AWQ_GROUP, n)),
    }
    return spec | ({"bias": (HALF, (n,))} if bias else {})


def pack_svdq(layer: SvdqLinear) -> dict[str, torch.Tensor]:
    """The checkpoint tensors of a W4A4 layer."""
    weight = layer.quantised
    tensors = {
        "qweight": pack.pack_qweight(weight.codes()),
        "smooth_factor": pack.pack_channels(layer.smooth.to(HALF)),
        "proj_down": pack.pack_down(layer.down),
        "proj_up": pack.pack_up(layer.up),
    }
    if weight.precision == "nvfp4":
        tensors["wscales"] = pack.pack_scales_nvfp4(weight.micro.to(torch.float8_e4m3fn))
        # The kernel multiplies by wtscale in float32, so the magnitude stands there and not in the row scales.
        tensors["wcscales"] = torch.ones(weight.grid.shape[0], dtype=HALF)
        tensors["wtscale"] = torch.tensor([weight.tensor_scale], dtype=HALF)
    else:
        tensors["wscales"] = pack.pack_scales_int4(weight.micro.to(HALF))
    if layer.bias is not None:
        tensors["bias"] = pack.pack_channels(layer.bias)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def unpack_svdq(tensors: dict[str, torch.Tensor], precision: str) -> tuple[SvdqLinear, torch.Tensor]:
    """Inverse of `pack_svdq`; also the per-row wcscales (N,), ones for int4."""
    codes = pack.unpack_qweight(tensors["qweight"])
    if precision == "nvfp4":
        micro, scale = pack.unpack_scales_nvfp4(tensors["wscales"]), tensors["wtscale"].float().item()
        row = pack.unpack_channels(tensors["wcscales"]).float()
    else:
        micro, scale, row = pack.unpack_scales_int4(tensors["wscales"]), 1.0, torch.ones(codes.shape[0])
    bias = pack.unpack_channels(tensors["bias"]) if "bias" in tensors else None
    layer = SvdqLinear(
        QuantWeight.from_codes(codes, micro, scale, precision),
        pack.unpack_channels(tensors["smooth_factor"]).float(),
        pack.unpack_up(tensors["proj_up"]),
        pack.unpack_down(tensors["proj_down"]),
        bias,
    )
    return layer, row


def pack_awq(layer: AwqLinear) -> dict[str, torch.Tensor]:
    """The checkpoint tensors of a W4A16 layer: scales and zeros plain, (K/64, N)."""
    tensors = {
        "qweight": pack.pack_awq(layer.codes),
        "wscales": layer.scales.T.to(HALF),
        "wzeros": layer.zeros.T.to(HALF),
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def unpack_awq(tensors: dict[str, torch.Tensor]) -> AwqLinear:
    """Inverse of `pack_awq`."""
    return AwqLinear(
        pack.unpack_awq(tensors["qweight"]),
        tensors["wscales"].T.float().contiguous(),
        tensors["wzeros"].T.float().contiguous(),
        tensors.get("bias"),
    )


def check_tensors(name: str, tensors: dict[str, torch.Tensor], spec: Spec) -> None:
    """The self-check on write: no tensor missing or extra, dtype and shape as the loader declares them, every number
    finite.
    """
    if tensors.keys() != spec.keys():
        raise CheckFailed(f"{name}: tensors {sorted(tensors.keys() ^ spec.keys())} are missing or unexpected.")
    for key, (dtype, shape) in spec.items():
        tensor = tensors[key]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckFailed(
                f"{name}.{key} is {tensor.dtype} {tuple(tensor.shape)}; the loader expects {dtype} {shape}."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckFailed(f"{name}.{key} holds NaN or infinite values.")
        if dtype == torch.float8_e4m3fn and bool((tensor.float() < 0).any()):
            raise CheckFailed(f"{name}.{key} holds negative scales; the tensor cores read them as unsigned.")
        if not shape and tensor.item() <= 0:
            raise CheckFailed(f"{name}.{key} is {tensor.item():g}; a scale is above zero.")


def check_round_trip(name: str, layer: Layer, tensors: dict[str, torch.Tensor]) -> None:
    """unpack(pack(layer)) is the layer, exactly."""
    if isinstance(layer, AwqLinear):
        same = torch.equal(unpack_awq(tensors).dense(), layer.dense().cpu())
    elif isinstance(layer, PlainLinear):
        plain = unpack_plain(tensors)
        same = torch.equal(plain.dense(), layer.dense().cpu()) and plain.input_scale == layer.input_scale
    else:
        again, _ = unpack_svdq(tensors, layer.quantised.precision)
        pairs = (
            (again.quantised.grid, layer.quantised.grid),
            (again.quantised.micro, layer.quantised.micro),
            (again.smooth, layer.smooth),
            (again.up, layer.up),
            (again.down, layer.down),
        )
        same = (
            all(torch.equal(left, right.cpu()) for left, right in pairs)
            and again.quantised.tensor_scale == layer.quantised.tensor_scale
        )
    if not same:
        raise CheckFailed(f"{name}: the packed tensors do not unpack to the quantised layer.")
