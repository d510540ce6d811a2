"""A benchmark for people: the table; what it says of the machine; and what a bundle keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from dcgen_convert.evaluation.speed import BATCH, STEP, seconds, shown, times, words
from dcgen_convert.judging.pair import BASE, ModelPair
from dcgen_convert.judging.speed import weights


def facts(pair: ModelPair, device: torch.device) -> dict[str, Any]:
    """What was compared, and with what: the fields of `api.results.Benchmarked` beside the figures."""
    models = {
        name: {
            "factor": model.grid.f,
            "channels": model.grid.c,
            "patch": model.grid.p,
            "parameters": sum(value.numel() for network in model.networks for value in network.parameters()),
            "bytes": weights(model.networks),
            "runtime": model.runtime,
        }
        for name, model in pair.models.items()
    }
    base = pair.models[BASE].network
    return {
        "family": pair.family.name,
        "base": pair.identity.name,
        "models": models,
        "steps": pair.steps,
        "guidance": pair.guidance,
        "dtype": str(base.dtype).removeprefix("torch."),
        "attention": attention(),
        "compiled": False,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "gpu": device.type == "cuda",
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }


def attention() -> str:
    """The attention that diffusers' networks compute with here."""
    from diffusers.models import attention_dispatch

    return str(attention_dispatch._AttentionBackendRegistry.get_active_backend()[0].value)  # noqa: SLF001  it has no public name


def _cpu() -> str:
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def kept(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle's manifest keeps: all but where the files lay."""
    return {key: value for key, value in document.items() if key not in ("schema", "status", "source", "base")}


def table(document: Mapping[str, Any]) -> str:
    """The figures, for people."""
    names = list(document["models"])
    lines = [
        f"{document['base']} on {document['device']}, {document['dtype']}, {document['attention']} attention, not "
        f"compiled, torch {document['torch']}; {document['steps']} steps, guidance {document['guidance']:g}"
    ]
    for size in document["sizes"]:
        lines += ["", shown(size), _line("", [*names, "speed-up"])]
        lines += [_figures(what, size, names) for what in size["rows"]]
        lines.append(
            _line("image tokens", [*(f"{size['tokens'][name]:,}" for name in names), times(size["tokens"]["ratio"])])
        )
        per = size["pictures_per_minute"]
        rates = {name: value / per[BASE] for name, value in per.items() if name != BASE}
        cells = [*(f"{per[name]:.3g}" for name in names), _several(rates)]
        noun = "videos" if "frames" in size else "pictures"
        lines.append(_line(f"{noun} per minute", cells))
        lines.append(_line("memory of a step", [_memory(size["rows"][STEP][name]) for name in names]))
        lines += _how(size, names)
    return "\n".join([*lines, *(f"note: {note}" for note in document["notes"])])


def _figures(what: str, size: Mapping[str, Any], names: list[str]) -> str:
    row = size["rows"][what]
    cells = [seconds(row[name]["seconds"]) for name in names]
    if what == BATCH:
        cells = [f"{cell} ({row[name]['batch']})" for cell, name in zip(cells, names, strict=True)]
    ratios = size["ratios"].get(what)
    return _line(words(what, size), [*cells, _several(ratios) if ratios else "the same"])


def _how(size: Mapping[str, Any], names: list[str]) -> list[str]:
    """How many rounds stand behind the figures."""
    parts = [
        f"{words(what, size)} {row[names[0]]['rounds']}"
        if "rounds" in row[names[0]]
        else f"{words(what, size)}: {row[names[0]]['basis']}"
        for what, row in size["rows"].items()
    ]
    return [f"  medians of rounds: {', '.join(parts)}"]


def _line(head: str, cells: list[str]) -> str:
    return f"  {head:24}" + "".join(f"{cell:>18}" for cell in cells)


def _several(ratios: Mapping[str, float]) -> str:
    return ", ".join(map(times, ratios.values()))


def _memory(figure: Mapping[str, Any]) -> str:
    found = figure.get("peak_bytes")
    if found is None:
        return "not known"
    return f"{found / 2**30:.2f} GiB" if found >= 2**30 else f"{found / 2**20:.3g} MiB"
