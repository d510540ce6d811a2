"""The tensors that a transformer folder must hold, derived from the model class alone (on the meta device, no weights).

The diffusers loader of 4-bit linears does not check keys: a missing tensor stays on the meta device and fails in the
first forward, a wrong dtype is cast to garbage. So the check is made here.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

from dcgen_convert.checkpoint.headers import read_weights
from dcgen_convert.core.files import read_json
from dcgen_convert.svdquant.forms import is_plain

DENSE = ("BF16", "F16", "F32")


class Expected(NamedTuple):
    """Allowed safetensors dtypes, and the shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


def meta_model(folder: Path) -> Any:
    """The model that ``folder``/config.json describes, on the meta device, without its quantisation.

    InputError when there is no such class.
    """
    import torch

    from dcgen_convert.networks.folder import class_of

    config, model_class = read_json(Path(folder) / "config.json"), class_of(folder)
    accepted = inspect.signature(model_class).parameters
    with torch.device("meta"):
        return model_class(**{key: value for key, value in config.items() if key in accepted})


def expected_tensors(folder: Path) -> tuple[dict[str, Expected], list[str]]:
    """(tensor name -> dtypes and shape, problems of the quantisation config such as a target that is no linear)."""
    import torch

    from dcgen_convert.svdquant.linears import kinds
    from dcgen_convert.svdquant.settings import AWQ_GROUP, GROUP
    from dcgen_convert.svdquant.source import NAMES

    model, problems = meta_model(folder), []
    table = {
        name: Expected(DENSE if value.is_floating_point() else (NAMES[value.dtype],), tuple(value.shape))
        for name, value in model.state_dict().items()
    }
    config = read_json(Path(folder) / "config.json")
    quantisation = config.get("quantization_config") or {}
    modules = dict(model.named_modules())
    for section in ("svdq_w4a4", "awq_w4a16"):
        settings = quantisation.get(section) or {}
        wanted = AWQ_GROUP if section == "awq_w4a16" else GROUP.get(str(settings.get("precision")))
        if settings and settings.get("group_size") != wanted:
            problems.append(f"{section} has group_size {settings.get('group_size')}, the kernels take {wanted}")
    for path, kind in kinds(config, read_weights(Path(folder)) if is_plain(config) else ()).items():
        linear = modules.get(path)
        if not isinstance(linear, torch.nn.Linear):
            problems.append(f"the folder holds {path} as a 4-bit linear, and it is no linear of the model")
            continue
        table.pop(f"{path}.weight", None)
        table.pop(f"{path}.bias", None)
        spec = kind.spec((linear.out_features, linear.in_features), linear.bias is not None)
        table |= {f"{path}.{name}": Expected((NAMES[dtype],), size) for name, (dtype, size) in spec.items()}
    return table, problems
