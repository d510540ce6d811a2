"""LoRA on a diffusers network through PEFT, and its export in the format that stock `load_lora_weights` reads.

W' = W + (alpha / rank) B A. The model keeps its diffusers class. The embedder and the head have no adapter: all their
weights train.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from dcgen_convert.checkpoint.updates import METADATA
from dcgen_convert.core import names
from dcgen_convert.core.errors import RecipeError
from dcgen_convert.core.files import atomic_save
from dcgen_convert.families.base import Network

ADAPTER = "default"


def add_lora(model: nn.Module, targets: str, rank: int, alpha: float, seed: int) -> list[str]:
    """Put an adapter on every linear whose full path matches the regex ``targets``; returns the paths.

    A regex over the full path, not a suffix: "proj_out" as a suffix would also adapt FLUX's output head.
    B starts at zero, so the model's output is unchanged; A is drawn from ``seed``.

    Raises:
        RecipeError: nothing matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # What diffusers' add_adapter does, for every model: DiTTransformer2DModel lacks that method.
        # alpha: PEFT says int, and works with any number.
        config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=targets)
        inject_adapter_in_model(config, model, ADAPTER)
    return paths


def remove_lora(model: nn.Module) -> None:
    """Take the adapter off; the base weights are as before `add_lora`."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    del model.peft_config


def trainable(model: nn.Module, modules: list[str], everything: bool = False) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of the LoRA weights and of the whole ``modules`` (embedder, head), or of everything."""
    inside = tuple(f"{module}." for module in modules)
    return [
        (name, p) for name, p in model.named_parameters() if everything or ".lora_" in name or name.startswith(inside)
    ]


def frozen_teacher(model: Network, modules: list[str]) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the model is what it was when this function was called.

    Inside it the adapter is off, and frozen copies stand in the place of ``modules``, which train on. It costs the
    memory of these copies only, not of a second model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    originals = {path: copy.deepcopy(model.get_submodule(path)).requires_grad_(False) for path in modules}
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

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
    """Rank, alpha and targets as diffusers' `_collate_lora_metadata` writes them.

    One key: two would not hash alike twice.
    """
    config = {
        key: list(value) if isinstance(value, set) else value
        for key, value in model.peft_config[ADAPTER].to_dict().items()
    }
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
