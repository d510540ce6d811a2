"""How the arguments of the API become a conversion, or a quantisation, that is ready to start."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dcgen_convert.api.settings import JOB, JobSettings
from dcgen_convert.core.disk import require_writable
from dcgen_convert.core.errors import InputError, RecipeError
from dcgen_convert.core.limits import require, require_text
from dcgen_convert.core.names import RECIPE
from dcgen_convert.planning import budget, rehearsal
from dcgen_convert.planning.shapes import Shapes, shapes_of
from dcgen_convert.ranks import hosts
from dcgen_convert.ranks.machine import Machine
from dcgen_convert.recipe import loading
from dcgen_convert.recipe.loading import Resolved
from dcgen_convert.recipe.schema import Quantize
from dcgen_convert.recipe.settings import Layers, one_sentence
from dcgen_convert.recipe.sources import require_access


@dataclass(frozen=True)
class Order:
    """A conversion that is ready to start: what to do, the run folder, and the folder of the bundle."""

    resolved: Resolved
    run_dir: Path
    output: Path

    def on(self, **machine: Any) -> Order:
        """The same order on another machine: fields of `Machine`."""
        return replace(self, resolved=replace(self.resolved, machine=replace(self.resolved.machine, **machine)))


def resolve(source: str | Path, settings: Mapping[str, Any], measured: str | Path | None = None) -> Resolved:
    """The recipe for ``source`` with ``settings`` over it (those of `JobSettings`), and what its budget gives.

    Args:
        measured: file of a rehearsal; None: the budget pays for what assumed rates say.
    Raises:
        TypeError: a setting that does not exist.
        RecipeError, InputError: settings or a source that cannot work.
    """
    loaded = _loaded(source, settings)
    if measured is None:
        return budget.applied(loaded, *_of_job(loaded))
    require_text("measured", str(measured))
    return budget.applied(loaded, *_of_job(loaded), rehearsal.read(Path(measured), loaded.recipe))


def _of_job(resolved: Resolved) -> tuple[Callable[[], Shapes], int]:
    """What a budget is applied with: the sizes of the models, and the number of ranks."""
    return partial(shapes_of, resolved.recipe, resolved.identity), hosts.world_of(resolved.machine)


def without_data(source: str | Path, settings: Mapping[str, Any]) -> Resolved:
    """`resolve` for what trains nothing: pictures, budget and timestep shift of the recipe do not count."""
    sets = [*(settings.get("sets") or ()), "data.beyond_base=true", "adapt.shift=model"]
    return _loaded(source, {**settings, "sets": sets}, complete=False)


def _loaded(source: str | Path, settings: Mapping[str, Any], *, complete: bool = True) -> Resolved:
    """`resolve` before the budget is looked at. complete: as in `recipe.loading.load`."""
    if unknown := sorted(settings.keys() - JobSettings.__annotations__.keys()):
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; known: {', '.join(JobSettings.__annotations__)}")
    given = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    zero, data = given.get("zero"), _paths(given.get("data"))
    hours = [given.get(name) for name in ("max_gpu_hours", "hours")]
    if hours.count(None) == 1:  # one of them is the budget, whatever the recipe says of the other
        hours = [value or 0 for value in hours]
    flags = {
        "ae": given.get("ae"),
        "base": given.get("base"),
        "loras": list(given.get("loras") or ()) or None,
        "ae_channels": given.get("ae_channels"),
        "quantize.format": given.get("quantize"),
        "merge_lora": given.get("merge_lora"),
        "bundle.layout": given.get("layout"),
        "data.path": data,
        "data.kind": None if data is None else "folder",
        "data.prompts": given.get("prompts"),
        "resolution": given.get("resolution"),
        "dtype": given.get("dtype"),
        "seed": given.get("seed"),
        "adapt.zero": int(zero) if isinstance(zero, str) and zero.isdigit() else zero,
        "adapt.offload": given.get("offload"),
        "revision": given.get("revision"),
        "budget.gpu_hours": hours[0],
        "budget.hours": hours[1],
    }
    return loading.load(
        str(source),
        flags=flags,
        sets=given.get("sets") or (),
        env=os.environ,
        recipe=given.get("recipe"),
        machine=_machine(given),
        complete=complete,
    )


def _paths(data: str | Sequence[str | Path] | None) -> str | list[str] | None:
    """`data.path` of one source or several; None for none."""
    if data is None or isinstance(data, str):
        return data
    found = [str(path) for path in data]
    return found if len(found) > 1 else next(iter(found), None)


def _machine(given: Mapping[str, Any]) -> Machine:
    gpus = given.get("gpus")
    require(gpus=gpus, restarts=given.get("restarts"), rank_timeout=given.get("rank_timeout"))
    watched = {name: given[name] for name in JOB if given.get(name) is not None}
    offline = bool(given.get("offline") or os.environ.get("HF_HUB_OFFLINE"))
    return Machine(gpus, given.get("hostfile"), offline, **watched)


def order(
    source: str | Path, settings: Mapping[str, Any], output: str | Path | None, run_dir: str | Path | None
) -> Order:
    """The order for a new conversion. The folders are named after the recipe unless they are given.

    Raises:
        AccessError: a model is neither here nor reachable; nothing has been written then, and nothing heavy imported.
    """
    require_folders(output=output, run_dir=run_dir)
    resolved = _loaded(source, settings)
    require_access(resolved.recipe, resolved.identity)
    name = default_name(resolved)
    run = Path(run_dir or Path("runs") / name).absolute()
    require_writable(run, "--run-dir")
    if (run / "model_index.json").exists():
        raise InputError(f"{run} holds a model, and a run needs a folder of its own", "choose another --run-dir")
    resolved = budget.applied(resolved, *_of_job(resolved), before=partial(_begun, run))
    return Order(resolved, run, Path(output or name).absolute())


def _begun(run: Path) -> Resolved | None:
    """What the run in this folder was started with; None where there is none."""
    from dcgen_convert.stages.records import recorded

    return recorded(run)[0] if (run / RECIPE).is_file() else None


def require_folders(**folders: str | Path | None) -> None:
    """InputError when what was given as a folder cannot be one, such as the empty text of an unset variable."""
    for name, folder in folders.items():
        if folder is not None:
            require_text(name, str(folder))


def quantisation(
    format: str, rank: int, calibration: int | None, dense: str | None, container: str, fuse_qkv: bool
) -> Quantize:
    """The recipe's section `quantize` for a source that is not converted; calibration None: from the weights alone.

    Raises:
        RecipeError: a value that cannot work.
    """
    pictures = {"prompts": 1 if calibration is None else calibration}
    values = {"format": format, "rank": rank, "calibration": pictures, "dense": dense, "container": container}
    try:
        return Quantize.model_validate({**values, "fuse_qkv": fuse_qkv})
    except ValidationError as exc:
        raise RecipeError(one_sentence(exc, Layers()), "dcgen-convert quantize --help") from exc


def default_name(resolved: Resolved) -> str:
    """`flux-krea-dc-ae-f64-nvfp4`: what the bundle and the run folder are called unless told otherwise."""
    recipe = resolved.recipe
    suffix = "" if recipe.quantize.format == "none" else f"-{recipe.quantize.format}"
    return f"{recipe.name}-{Path(recipe.ae).name}{suffix}"
