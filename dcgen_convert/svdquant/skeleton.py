"""A stock diffusers model without its weights, and the weights of one part of it when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dcgen_convert.checkpoint.headers import Entry
from dcgen_convert.checkpoint.tensors import read_tensor
from dcgen_convert.core.errors import InputError


class _EmptyOnMeta(TorchFunctionMode):
    """Uninitialised tensors take no memory: they are what layers allocate for their parameters. Buffers that are
    computed stay real.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, and real non-persistent buffers."""
    with _EmptyOnMeta():
        yield


def build(config: dict[str, Any]) -> torch.nn.Module:
    """The model that config.json describes, in eval mode. Errors: InputError when diffusers has no such class."""
    import diffusers

    name = config.get("_class_name", "")
    if not hasattr(diffusers, name):
        raise InputError(
            f"config.json names the class {name!r}, which diffusers {diffusers.__version__} does not have."
        )
    with without_memory():
        model = getattr(diffusers, name).from_config(
            {key: value for key, value in config.items() if key != "quantization_config"}
        )
    return model.eval().requires_grad_(False)


def load(
    module: torch.nn.Module,
    prefix: str,
    entries: dict[str, Entry],
    device: str,
    dtype: torch.dtype,
    skip: tuple[str, ...] = (),
) -> None:
    """Fill `module` (at path `prefix` in the model) from the source, floating tensors as `dtype`. What lies under a
    path of `skip` is left out.

    Errors: InputError naming a parameter that the checkpoint lacks.
    """
    dot = f"{prefix}." if prefix else ""
    state = {}
    for name in module.state_dict():
        full = dot + name
        if any(full.startswith(f"{path}.") for path in skip):
            continue
        if full not in entries:
            raise InputError(
                f"The checkpoint holds no {full}.", hint="Check that config.json belongs to these weights."
            )
        tensor = read_tensor(entries[full])
        state[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    module.load_state_dict(state, strict=False, assign=True)
    for path, buffer in module.named_buffers():
        if path not in state and not buffer.is_meta:
            owner, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(owner), leaf, buffer.to(device))
    module.requires_grad_(False)
