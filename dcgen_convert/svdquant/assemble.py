"""The output folder: quantised tensors from the work folder, everything else copied from the source."""

import shutil
from pathlib import Path

import torch

from dcgen_convert.core.errors import CheckFailed
from dcgen_convert.core.files import fsync, write_json
from dcgen_convert.svdquant.job import Job, Targets
from dcgen_convert.svdquant.settings import AWQ_GROUP, Settings
from dcgen_convert.svdquant.shards import Item, write_folder
from dcgen_convert.svdquant.source import Entry, read_header

RECORDS = "quantization.json"  # per-layer records; written last, so its presence marks a whole folder


def assemble(job: Job, output: Path, records: list[dict]) -> None:
    """Build the folder inside the work folder, rename it to `output`, and remove the work folder.

    Order: weights, index, config.json, records. Times are left out of the records: the same job gives the same bytes.
    """
    building = job.work / "output"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    write_folder(building, _items(job), job.settings.max_shard_bytes)
    quantisation = {"quantization_config": quantization_config(job.targets, job.settings)}
    write_json(building / "config.json", job.config | quantisation)
    layers = [timeless(record) for record in records]
    settings = {key: value for key, value in job.settings.as_dict().items() if key != "device"}
    write_json(building / RECORDS, {"schema": "dcgen.quantization/1", "settings": settings, "layers": layers})
    building.rename(output)
    fsync(output.parent)
    shutil.rmtree(job.work)


def timeless(record: dict) -> dict:
    """A layer's record without what differs from run to run."""
    return {key: value for key, value in record.items() if key != "seconds"}


def _items(job: Job) -> list[Item]:
    """Every tensor of the output in the source's order; a target's tensors stand where its weight stood."""
    quantised: dict[str, list[Entry]] = {}
    for path in sorted((job.work / "blocks").glob("*.safetensors")):
        for entry in read_header(path).values():
            quantised.setdefault(entry.name.rpartition(".")[0], []).append(entry)
    chosen = {*job.targets.svdq, *job.targets.awq}
    if chosen != quantised.keys():
        raise CheckFailed(f"Planned and quantised layers differ, first in {min(chosen ^ quantised.keys())}.")
    items = []
    for name, entry in job.entries.items():
        module, _, part = name.rpartition(".")
        if module not in chosen:
            cast = torch.bfloat16 if job.settings.dense_dtype == "bf16" and entry.dtype == torch.float32 else None
            items.append(Item(name, entry, cast))
        elif part == "weight":
            items += [Item(tensor.name, tensor) for tensor in quantised[module]]
    return items


def quantization_config(targets: Targets, settings: Settings) -> dict:
    """The `quantization_config` of config.json (nunchaku's file format); a section without targets is left out."""
    document: dict = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16"}
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
