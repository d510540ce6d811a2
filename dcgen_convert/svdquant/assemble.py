"""The output folder: quantised tensors from the work folder, everything else copied from the source."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcgen_convert.checkpoint.headers import read_header
from dcgen_convert.checkpoint.shards import write_folder
from dcgen_convert.checkpoint.stream import Item, whole
from dcgen_convert.core import names
from dcgen_convert.core.errors import CheckFailed
from dcgen_convert.core.files import fsync, write_json
from dcgen_convert.families import QuantTargets
from dcgen_convert.svdquant.forms import BFL, NUNCHAKU_LITE
from dcgen_convert.svdquant.quantisation import Quantisation
from dcgen_convert.svdquant.settings import AWQ_GROUP, QuantSettings


def assemble(quantisation: Quantisation, output: Path, records: list[dict[str, Any]]) -> None:
    """Build the folder inside the work folder, rename it to `output`, and remove the work folder.

    Order: weights, index, config.json, records. The records lose their times, so that the same inputs give the same
    bytes.
    """
    building, settings = quantisation.work / "output", quantisation.settings
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    items = _items(quantisation)
    single = settings.plain  # diffusers reads this form with `from_single_file`
    write_folder(building, items, most=sum(item.size for item in items.values()) if single else None)
    section = {"quantization_config": quantization_config(quantisation.targets, settings)}
    write_json(building / "config.json", quantisation.config | section)
    chosen = {key: value for key, value in asdict(settings).items() if key != "device"}
    layers = [timeless(record) for record in records]
    write_json(building / names.RECORDS, {"schema": "dcgen.quantization/1", "settings": chosen, "layers": layers})
    building.rename(output)
    fsync(output.parent)
    shutil.rmtree(quantisation.work)


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A layer's record without what differs from run to run."""
    return {key: value for key, value in record.items() if key != "seconds"}


def _items(quantisation: Quantisation) -> dict[str, Item]:
    """Every tensor of the output in the source's order; a target's tensors stand where its weight stood."""
    quantised: dict[str, dict[str, Item]] = {}
    for path in sorted((quantisation.work / "blocks").glob("*.safetensors")):
        for name, entry in read_header(path)[0].items():
            quantised.setdefault(name.rpartition(".")[0], {})[name] = whole(name, entry)
    chosen = {*quantisation.targets.svdq, *quantisation.targets.awq}
    if chosen != quantised.keys():
        raise CheckFailed(f"Planned and quantised layers differ, first in {min(chosen ^ quantised.keys())}.")
    items: dict[str, Item] = {}
    for name, entry in quantisation.entries.items():
        module, _, part = name.rpartition(".")
        if module not in chosen:
            items[name] = whole(name, entry)
        elif part == "weight":
            items |= quantised[module]
    return items


def quantization_config(targets: QuantTargets, settings: QuantSettings) -> dict[str, Any]:
    """The `quantization_config` of config.json (nunchaku's file format); a section without targets is left out. The
    form `bfl` knows its linears by their tensors.
    """
    if settings.plain:
        return {"quant_method": BFL}
    document: dict[str, Any] = {"quant_method": NUNCHAKU_LITE, "compute_dtype": "bfloat16"}
    if targets.svdq:
        document["svdq_w4a4"] = {
            "precision": settings.precision,
            "group_size": settings.group,
            "rank": settings.rank,
            "targets": list(targets.svdq),
        }
    if targets.awq:
        document["awq_w4a16"] = {"precision": "int4", "group_size": AWQ_GROUP, "targets": list(targets.awq)}
    return document
