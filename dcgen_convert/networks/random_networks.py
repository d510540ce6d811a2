"""Networks with random weights in memory, for what does not depend on values: how long they take, and how much memory.

Only the parameters are random. What a class computes when it is made, such as tables of positions, is as it should be.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from dcgen_convert.checkpoint.stream import Item
from dcgen_convert.checkpoint.tensors import TORCH
from dcgen_convert.families.base import Pipeline
from dcgen_convert.families.components import Component, Layout
from dcgen_convert.networks import processors, random_source, random_weights
from dcgen_convert.networks.pipelines import quiet_diffusers
from dcgen_convert.networks.wide import widen

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # of dtypes in safetensors


def parameters(part: Component) -> int:
    """How many numbers the weights of a part are; 0 for a tokenizer or a scheduler."""
    return 0 if part.dtype is None else sum(value.numel() for value in random_source.model_of(part).parameters())


def network(
    part: Component, dtype: torch.dtype, name: str, numbers: Tensor, shared: Mapping[str, nn.Parameter] | None = None
) -> nn.Module:
    """The network of a part, frozen, in eval mode.

    Args:
        name: two networks with different names get different numbers.
        numbers: see `random_weights.pool`.
        shared: parameters of another network. Where name and shape are the same they are taken as they are, without a
            copy.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), quiet_diffusers():
        model = random_source.network_of(part)
    return filled(model, dtype, name, numbers, shared or {})


def filled(
    model: nn.Module, dtype: torch.dtype, name: str, numbers: Tensor, shared: Mapping[str, nn.Parameter]
) -> nn.Module:
    """``model``, whose parameters have no memory yet, with random ones: see `network`."""
    for key, item in random_weights.items(model, NAMES[dtype], name, numbers).items():
        path, _, last = key.rpartition(".")
        owner, value = model.get_submodule(path), shared.get(key)
        made = owner._buffers.get(last)  # noqa: SLF001
        if made is not None:  # by the class; only its dtype is that of a loaded network
            owner._buffers[last] = made.to(dtype) if made.is_floating_point() else made  # noqa: SLF001
            continue
        if value is None or tuple(value.shape) != item.shape:
            value = nn.Parameter(tensor_of(item), requires_grad=False)
        owner._parameters[last] = value  # noqa: SLF001  `register_parameter` refuses a name that is there
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()  # transformers: the other names of a parameter that has two
    lost = [key for key, value in model.named_parameters() if value.is_meta]
    assert not lost, f"{type(model).__name__} has parameters without values: {lost[:3]}"
    widen(model.eval().requires_grad_(False))
    return model


def tensor_of(item: Item) -> Tensor:
    """The tensor that ``item`` would be written as."""
    value = torch.empty(item.shape, dtype=getattr(torch, TORCH[item.dtype]))
    flat, start = value.view(-1).view(torch.uint8), 0
    for chunk in item.chunks():
        flat[start : start + len(chunk)] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
        start += len(chunk)
    assert start == len(flat), "an item has as many bytes as its shape says"
    return value


def pipeline(layout: Layout, dtype: torch.dtype, numbers: Tensor) -> Pipeline:
    """The stock pipeline of ``layout`` with random weights, on the CPU."""
    import diffusers

    networks = {key: network(part, dtype, key, numbers) for key, part in layout.parts.items() if part.dtype}
    with TemporaryDirectory() as folder, quiet_diffusers():
        random_source.write_rest(layout, Path(folder))
        others = processors.without_torchvision(Path(folder), random_source.index_of(layout))
        found = getattr(diffusers, layout.pipeline).from_pretrained(folder, dtype=dtype, **networks, **others)
    found.set_progress_bar_config(disable=True)
    return found


def with_parts(pipeline: Pipeline, **parts: Any) -> Pipeline:
    """A pipeline of the same class, which shares all parts with ``pipeline`` but those that are given."""
    settings = {
        key: value
        for key, value in pipeline.config.items()
        if not key.startswith("_") and key not in pipeline.components
    }
    with quiet_diffusers():
        found = type(pipeline)(**{**pipeline.components, **parts}, **settings)
    found.set_progress_bar_config(disable=True)
    return found
