"""The weight files of a model folder: one file, or shards with their index. The tensors are streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dcgen_convert.checkpoint import stream
from dcgen_convert.core.files import write_json

SHARD_BYTES = 5 * 1000**3  # a file is closed before it would pass this size: the usual size of shards on the hub
STEM = "diffusion_pytorch_model"  # diffusers' name of weight files
METADATA = {"format": "pt"}


def write_folder(
    folder: Path,
    items: Mapping[str, stream.Item],
    stem: str = STEM,
    most: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Write the weights in ``folder``: one file, or shards with their index.

    The tensors are dealt to the shards in the order of ``items``. A larger tensor has a shard to itself.

    Args:
        stem: name of the files without number and suffix.
        most: bytes of a shard; None: SHARD_BYTES.
        advance: is told the bytes.
    """
    shards: list[dict[str, stream.Item]] = [{}]
    filled = 0
    for name, item in items.items():
        if shards[-1] and filled + item.size > (most or SHARD_BYTES):
            shards.append({})
            filled = 0
        shards[-1][name] = item
        filled += item.size
    if len(shards) == 1:
        stream.write(folder / f"{stem}.safetensors", items, METADATA, advance)
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        stream.write(folder / file, shard, METADATA, advance)
        where |= dict.fromkeys(shard, file)
    total = {"total_size": sum(item.size for item in items.values())}
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": total, "weight_map": where})
