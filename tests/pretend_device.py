"""A pretend accelerator for machines without one: `with pretend_device.ready():` makes tensors of device "pretend".

Such a tensor wraps a CPU tensor that does the arithmetic, so numbers are real. As on a GPU, an operation that takes
tensors of both devices raises, but for numbers without dimensions, and for copies and indices, which may cross.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
ops = torch.ops.aten
CROSSING = {ops.copy_.default, ops.index.Tensor, ops.index_put_.default, ops._index_put_impl_.default}
AT_ONCE = {
    ops._conj.default: ops._conj_physical.default,
    ops._neg_view.default: ops.neg.default,
}  # here the lazy ones are lost


class Placed(torch.Tensor):
    """A tensor that says it is on the pretend device; ``values`` is the CPU tensor behind it."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, device=torch.device(NAME, 0), **layout)

    def __init__(self, values: torch.Tensor):
        self.values = values

    def __repr__(self) -> str:
        return f"Placed({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees the operations that make a tensor from none, `torch.zeros(..., device="pretend")`."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})


def _compute(operation, args: tuple, kwargs: dict):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    placed = [tensor for tensor in tensors if isinstance(tensor, Placed)]
    device = kwargs.get("device")
    if not placed and (device is None or torch.device(device).type != NAME):
        return operation(*args, **kwargs)
    if operation is ops._fused_sdp_choice.default:
        return 0  # plain attention
    there = bool(placed) if device is None else torch.device(device).type == NAME
    if operation is ops.copy_.default:
        there = isinstance(args[0], Placed)
    elif device is None and operation not in CROSSING:
        _refuse_strangers(operation, tensors)
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    origin = {id(tensor.values): tensor for tensor in placed}
    args, kwargs = tree_map(lambda leaf: leaf.values if isinstance(leaf, Placed) else leaf, (args, kwargs))
    result = AT_ONCE.get(operation, operation)(*args, **kwargs)

    def back(leaf):
        if isinstance(leaf, torch.Tensor) and there and not isinstance(leaf, Placed):
            return origin[id(leaf)] if id(leaf) in origin else Placed(leaf)
        return leaf

    return tree_map(back, result)


def _refuse_strangers(operation, tensors: list[torch.Tensor]) -> None:
    strangers = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, Placed) and tensor.dim()]
    if strangers:
        raise RuntimeError(f"{operation} got tensors of two devices, {NAME} and cpu; on the cpu: {strangers}")


@cache
def _register() -> None:
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
    # The registration lasts as long as the process, and recomputed activations of later tests ask the device for it.
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]


@contextmanager
def ready() -> Iterator[str]:
    """The name of the device; inside, modules can move to it, and tensors can be made on it."""
    _register()
    makers = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}  # they make no operation that is seen
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a wrapper's data cannot be exchanged
    for name, make in makers.items():
        setattr(torch, name, lambda data, *, device=None, make=make, **options: make(data, **options).to(device))
    try:
        with (
            _Factories(),
            torch.autograd.set_multithreading_enabled(False),
        ):  # the backward pass in this thread: it has the mode
            yield NAME
    finally:
        for name, make in makers.items():
            setattr(torch, name, make)
        torch.__future__.set_overwrite_module_params_on_conversion(before)
