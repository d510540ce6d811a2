"""A pretend accelerator for machines without one: `with pretend_device.ready():` makes tensors of device "pretend".

Such a tensor wraps a CPU tensor that does the arithmetic, so numbers are real. As on a GPU, an operation that takes
tensors of both devices raises, but for numbers without dimensions, and for copies and indices, which may cross. So does
a random number generator of the CPU that is to fill a tensor of the device.

`strict` refuses numbers without dimensions and indices of the CPU too, as some makes do. `without_memory` computes
shapes and types only, so that models of any size fit. `counting` counts how often the host and the device wait for one
another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretend"
READ, SIZE, OUT, IN = "values read", "sizes read", "copies out", "copies in"
ops = torch.ops.aten
INDEXING = {ops.index.Tensor, ops.index_put_.default, ops.index_put.default, ops._index_put_impl_.default}
READING = {ops._local_scalar_dense.default, ops.equal.default, ops.is_nonzero.default}
SIZED_BY_VALUES = {
    ops.nonzero.default,
    ops.masked_select.default,
    ops._unique2.default,
    ops.unique_consecutive.default,
    ops.unique_dim.default,
    ops.repeat_interleave.Tensor,
    ops.bincount.default,
}
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

    def __getitem__(self, index):
        return super().__getitem__(_on_the_device(index))

    def __setitem__(self, index, value):
        super().__setitem__(_on_the_device(index), value)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, **_) -> None:
        raise TypeError(f"can't convert a {NAME} tensor to numpy: copy it to host memory first")

    def __array__(self, *_) -> None:
        self.numpy()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})


def _on_the_device(index):
    """An index whose lists are tensors there; torch's own way to send them is not seen."""
    if isinstance(index, list):
        return torch.tensor(index, device=NAME)
    return tuple(map(_on_the_device, index)) if isinstance(index, tuple) else index


class _Factories(TorchDispatchMode):
    """Sees the operations that make a tensor from none, `torch.zeros(..., device="pretend")`."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})


class _Rules:
    """What the device does now.

    behind: where its values are: "cpu", or "meta" for none. strict: of another make. counts: takes what is counted.
    pinned: tensors by id.
    """

    behind = "cpu"
    strict = False
    counts: Counter | None = None
    pinned: ClassVar[dict[int, torch.Tensor]] = {}  # alive, so that an id names one tensor


def _compute(operation, args: tuple, kwargs: dict):
    leaves = list(_leaves((args, *kwargs.values())))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    placed = [tensor for tensor in tensors if isinstance(tensor, Placed)]
    device = kwargs.get("device")
    if not placed and (device is None or torch.device(device).type != NAME):
        return operation(*args, **kwargs)
    if operation is ops._fused_sdp_choice.default:
        return 0  # plain attention
    there = bool(placed) if device is None else torch.device(device).type == NAME
    if operation is ops.copy_.default:
        there = isinstance(args[0], Placed)
    elif device is None:
        _refuse_strangers(operation, args, tensors)
    if there and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{operation} got a generator of the cpu for a tensor on {NAME}")
    _count(operation, args, kwargs, there)
    if device is not None:
        kwargs = {**kwargs, "device": _Rules.behind if there else "cpu"}
    origin = {id(tensor.values): tensor for tensor in placed}
    args = _mapped(_values, args)
    kwargs = {key: _mapped(_values, value) for key, value in kwargs.items()}
    result = AT_ONCE.get(operation, operation)(*args, **kwargs)

    def back(leaf):
        if isinstance(leaf, torch.Tensor) and there and not isinstance(leaf, Placed):
            return origin[id(leaf)] if id(leaf) in origin else Placed(leaf)
        return leaf

    return _mapped(back, result)


def _leaves(value) -> Iterator:
    """What is in lists and tuples; torch's own trees take most of the time of a small operation."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _mapped(function, value):
    """``value`` with ``function`` of every leaf in lists and tuples."""
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, part) for part in value])
    return function(value)


def _values(leaf):
    return leaf.values if isinstance(leaf, Placed) else leaf


def _refuse_strangers(operation, args: tuple, tensors: list[torch.Tensor]) -> None:
    """RuntimeError for tensors of both devices. Indices of the CPU may point into the device, never the other way."""
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Placed)]
    if operation in INDEXING and isinstance(args[0], Placed) and not _Rules.strict:
        return
    if operation not in INDEXING and not _Rules.strict:
        strangers = [tensor for tensor in strangers if tensor.dim()]
    if strangers:
        shapes = [tuple(tensor.shape) for tensor in strangers]
        raise RuntimeError(f"{operation} got tensors of two devices, {NAME} and cpu; on the cpu: {shapes}")


def _count(operation, args: tuple, kwargs: dict, there: bool) -> None:
    """Note where the host waits for the device: it reads a value or a size, or copies without leave to run ahead."""
    counts = _Rules.counts
    if counts is None:
        return
    if operation in READING:
        counts[READ] += 1
    if operation in SIZED_BY_VALUES:
        counts[SIZE] += 1
    if operation in INDEXING:
        indices = [index for index in args[1] if index is not None]
        counts[SIZE] += any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        counts[IN] += sum(not isinstance(index, Placed) for index in indices)
    if operation in (ops._to_copy.default, ops.copy_.default):
        source = args[operation is ops.copy_.default]
        ahead = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if isinstance(source, Placed) and not there:
            counts[OUT] += 1
        elif there and not isinstance(source, Placed) and not (ahead and id(source) in _Rules.pinned):
            counts[IN] += 1


@contextmanager
def counting() -> Iterator[Counter]:
    """Counts of what happens inside: READ, SIZE, OUT, IN. Copies from pinned memory that run ahead are not counted."""
    before, _Rules.counts = _Rules.counts, Counter()
    try:
        yield _Rules.counts
    finally:
        _Rules.counts = before


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors of the device have no values: shapes, types and devices are real. What reads a value fails."""
    before, _Rules.behind = _Rules.behind, "meta"
    try:
        yield
    finally:
        _Rules.behind = before


@contextmanager
def strict() -> Iterator[None]:
    """A make of device that takes no tensor of the CPU at all, but in a copy."""
    before, _Rules.strict = _Rules.strict, True
    try:
        yield
    finally:
        _Rules.strict = before


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a CPU tensor that counts as pinned."""
    assert not isinstance(tensor, Placed), "only memory of the host is pinned"
    pinned = tensor.clone()
    _Rules.pinned[id(pinned)] = pinned
    return pinned


def _read(data: object) -> object:
    """Numbers of the device in a list are read one by one, as torch does it on a GPU."""
    return [one.item() if isinstance(one, Placed) else one for one in data] if isinstance(data, list) else data


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
    pin = torch.Tensor.pin_memory
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a wrapper's data cannot be exchanged
    for name, make in makers.items():
        setattr(torch, name, lambda data, *, device=None, make=make, **options: make(_read(data), **options).to(device))
    torch.Tensor.pin_memory = _pin
    try:
        with (
            _Factories(),
            torch.autograd.set_multithreading_enabled(False),
        ):  # the backward pass in this thread: it has the mode
            yield NAME
    finally:
        for name, make in makers.items():
            setattr(torch, name, make)
        torch.Tensor.pin_memory = pin
        _Rules.pinned.clear()
        torch.__future__.set_overwrite_module_params_on_conversion(before)
