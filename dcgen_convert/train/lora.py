"""LoRA on a diffusers network through PEFT, and its export in the format that stock `load_lora_weights` reads.

W' = W + (alpha / rank) B A. The model keeps its diffusers class. The embedder and the head have no adapter: all their
weights train.

LoRA can begin elsewhere than at zero, with A0 and B0. Then a second, frozen adapter takes B0 A0 away again:
W' = W + (alpha / rank) (B A - B0 A0). Together both are one LoRA of twice the rank, and that is what is exported.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dcgen_convert.checkpoint.updates import METADATA
from dcgen_convert.core import names
from dcgen_convert.core.errors import RecipeError
from dcgen_convert.core.files import atomic_save
from dcgen_convert.families.base import Network

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

ADAPTER, FROZEN = "default", "start"
Start = Mapping[str, Tensor]  # "PATH.A" (k, in), "PATH.B" (out, k) of where LoRA begins, k <= rank


def targeted(model: nn.Module, targets: str) -> list[str]:
    """Paths of the linears and convolutions whose full path matches the regex ``targets``.

    A regex over the full path, not a suffix: "proj_out" as a suffix would also adapt FLUX's output head.

    Raises:
        RecipeError: nothing matches.
    """
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and re.fullmatch(targets, path)
    ]
    if not paths:
        raise RecipeError(
            f"no linear of {type(model).__name__} matches the LoRA targets {targets!r}",
            hint="leave adapt.phases.*.targets out",
        )
    return paths


def add_lora(
    model: nn.Module, targets: str, rank: int, alpha: float, seed: int, start: Start | None = None
) -> list[str]:
    """Put an adapter on every layer of `targeted`; returns the paths.

    Without ``start`` B is zero and A is drawn from ``seed``; with it, both begin there, and a frozen adapter takes
    their product away. Either way the model's output is unchanged.

    Raises:
        RecipeError: nothing matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    paths = targeted(model, targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # What diffusers' add_adapter does, for every model: DiTTransformer2DModel lacks that method.
        # alpha: PEFT says int, and works with any number.
        config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=targets)
        inject_adapter_in_model(config, model, ADAPTER)
        if start is not None:
            same = LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules="|".join(map(re.escape, paths)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a second adapter
                inject_adapter_in_model(same, model, FROZEN)
            _begin(model, paths, start)
    return paths


@torch.no_grad()
def _begin(model: nn.Module, paths: list[str], start: Start) -> None:
    """Give both adapters the values of ``start``; directions that it lacks begin at zero."""
    for path in paths:
        layer = cast("LoraLayer", model.get_submodule(path))
        layer.set_adapter([ADAPTER, FROZEN])
        for name, sign in ((ADAPTER, 1), (FROZEN, -1)):
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            up.zero_()
            if sign < 0:
                down.zero_().requires_grad_(False)
                up.requires_grad_(False)
            if f"{path}.A" in start:
                first, second = start[f"{path}.A"], start[f"{path}.B"]
                down[: len(first)] = first.view(-1, *down.shape[1:])
                up[:, : second.shape[1]] = sign * second.view(*second.shape, *up.shape[2:])


def joined(weights: Mapping[str, Tensor], start: Start | None) -> dict[str, Tensor]:
    """The trained tensors with the frozen adapter beside the LoRA: one LoRA of twice the rank, [B, -B0] [A; A0]."""
    result = dict(weights)
    for name, value in weights.items() if start is not None else ():
        path, _, side = name.partition(".lora_")
        if not side:
            continue
        other = torch.zeros_like(value)
        found = start.get(f"{path}.{side[0]}") if start else None
        if found is not None and side[0] == "A":
            other[: len(found)] = found.view(-1, *value.shape[1:])
        elif found is not None:
            other[:, : found.shape[1]] = -found.view(*found.shape, *value.shape[2:])
        result[name] = torch.cat([value, other], dim="AB".index(side[0]))
    return result


def remove_lora(model: nn.Module) -> None:
    """Take the adapter off; the base weights are as before `add_lora`."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    del model.peft_config


def trainable(model: nn.Module, modules: list[str], everything: bool = False) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of the LoRA weights and of the whole ``modules`` (embedder, head), or of everything."""
    inside = tuple(f"{module}." for module in modules)
    return [
        (name, p)
        for name, p in model.named_parameters()
        if everything or (".lora_" in name and f".{ADAPTER}." in name) or name.startswith(inside)
    ]


def frozen_teacher(model: Network, modules: list[str]) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the model is what it was when this function was called.

    Inside it the adapter is off, and frozen copies stand in the place of ``modules``, which train on. It costs the
    memory of these copies only, not of a second model.
    """
    from peft.tuners.lora import LoraLayer

    originals = {path: copy.deepcopy(model.get_submodule(path)).requires_grad_(False) for path in modules}
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]

    @contextmanager
    def teacher() -> Iterator[None]:
        students = {path: model.get_submodule(path) for path in modules}
        device, dtype = next(next(iter(students.values())).parameters()).device, model.dtype
        try:
            for path, original in originals.items():
                model.set_submodule(path, original.to(device, dtype))
            for module in adapted:
                module.enable_adapters(False)
            yield
        finally:
            for path, student in students.items():
                model.set_submodule(path, student)
            for module in adapted:
                module.enable_adapters(True)
                for layers in (module.lora_A, module.lora_B):
                    if FROZEN in layers:
                        layers[FROZEN].requires_grad_(False)

    return teacher


def split_export(weights: Mapping[str, Tensor], component: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(LoRA tensors under the names stock pipelines read, whole tensors under their own names).

    Args:
        component: what the pipeline calls the network.
    """
    lora = {
        f"{component}." + name.replace(f".{ADAPTER}.", "."): value
        for name, value in weights.items()
        if ".lora_" in name
    }
    return lora, {name: value for name, value in weights.items() if ".lora_" not in name}


def adapter_metadata(model: Network, component: str) -> dict[str, str]:
    """Rank, alpha and targets as diffusers' `_collate_lora_metadata` writes them; of both adapters `joined`.

    One key: two would not hash alike twice.
    """
    times = len(model.peft_config)  # twice the rank with twice the alpha: the same scale
    config = {
        key: list(value) if isinstance(value, set) else value
        for key, value in model.peft_config[ADAPTER].to_dict().items()
    }
    config |= {"r": times * config["r"], "lora_alpha": times * config["lora_alpha"]}
    return {
        METADATA: json.dumps({f"{component}.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)
    }


def save_export(
    weights: Mapping[str, Tensor], folder: Path, metadata: dict[str, str] | None, component: str
) -> dict[str, Path]:
    """Write the LoRA (when there is one) and the whole modules; returns their paths by kind: "lora", "modules"."""
    folder.mkdir(parents=True, exist_ok=True)
    lora, modules = split_export(weights, component)
    paths = {"modules": folder / names.MODULES}
    if lora:
        paths["lora"] = folder / names.LORA
        atomic_save(lora, paths["lora"], metadata)
    atomic_save(modules, paths["modules"])  # last: its presence says that the export is complete
    return paths
