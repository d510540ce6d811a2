"""What is kept about the inputs of one linear layer: bounded, whatever the number of calls (after arXiv 2411.05007)."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from dcgen_convert.checkpoint.headers import read_header
from dcgen_convert.checkpoint.tensors import read_tensor
from dcgen_convert.core.files import atomic_save

KEY = "stats"  # of a file's metadata
SAMPLES = 512  # tokens that are kept for scoring; 21 candidates of smoothing are scored on them
HESSIAN_TOKENS = 32_768  # tokens that enter a Hessian: more than twice the channels of FLUX's widest layer (15,360)


@dataclass
class Stats:
    """Statistics of a layer's input tokens x (K,).

    name     the first layer that reads them
    amax     (K,) largest magnitude per channel, over all tokens
    tokens   (T, K) at most `SAMPLES` tokens
    total    (K, K) sum of x x^T over `count` other tokens; None when its memory was given away
    readers  how many layers will ask for the Hessian; 0: not known
    """

    name: str
    amax: torch.Tensor
    tokens: torch.Tensor
    total: torch.Tensor | None
    count: int
    readers: int = 0

    def hessian(self, smooth: torch.Tensor) -> torch.Tensor:
        """The Hessian of x / smooth, diag(1/s) H diag(1/s) with H = total / count, without another forward pass.

        A copy. But the last of `readers` gets the memory of the sum itself, which is 0.9 GB at 15360 channels.
        """
        if self.total is None:
            raise RuntimeError(f"the Hessian of {self.name} was given away to its last reader")
        self.readers -= 1
        rows = smooth[:, None] * max(self.count, 1)
        if self.readers:
            return (self.total / rows).div_(smooth)
        given, self.total = self.total, None
        return given.div_(rows).div_(smooth)


class Gatherer:
    """Makes the statistics of a layer's inputs, call by call.

    A seeded generator draws the tokens: the same number from every call, and at most a quarter of it, for `tokens`;
    others, at most `HESSIAN_TOKENS` in all, for the Hessian. So a choice made with one can be judged with the other. A
    call of one token enters both.
    """

    def __init__(self, name: str, channels: int, calls: int, seed: int, device: str = "cpu") -> None:
        self.name, self.calls, self.count = name, calls, 0
        self.amax = torch.zeros(channels, device=device)
        self.total = torch.zeros(channels, channels, device=device)
        self.drawn: list[torch.Tensor] = []
        self._generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)

    def add(self, x: torch.Tensor, call: int) -> None:
        """Take in the input x (..., K) of one call; `call` counts from 0."""
        x = x.detach().reshape(-1, x.shape[-1])  # (tokens, K)
        order = torch.randperm(x.shape[0], generator=self._generator).to(x.device)
        self.amax = torch.maximum(self.amax, x.abs().amax(0).float())
        kept = min(_part(SAMPLES, call, self.calls), max(1, x.shape[0] // 4))
        self.drawn.append(x[order[:kept]].float())
        rest = order[kept:] if x.shape[0] > kept else order
        picked = x[rest[: _part(HESSIAN_TOKENS, call, self.calls)]].float()
        self.total.addmm_(picked.T, picked)
        self.count += picked.shape[0]

    def stats(self, readers: int = 0) -> Stats:
        """What was gathered; `readers` layers will ask for the Hessian."""
        return Stats(self.name, self.amax, torch.cat(self.drawn), self.total, self.count, readers)


def save(stats: dict[str, Stats], path: Path) -> None:
    """Keep the statistics of a block's targets. Layers that have one Stats in common have one in common after `load`.

    RuntimeError when a Hessian was given away already.
    """
    owned = {item.name: item for item in stats.values()}
    tensors: dict[str, torch.Tensor] = {}
    for name, item in owned.items():
        if item.total is None:
            raise RuntimeError(f"the Hessian of {name} was given away to its last reader")
        parts = {"amax": item.amax, "tokens": item.tokens, "total": item.total}
        tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in parts.items()}
    counts = {name: [item.count, item.readers] for name, item in owned.items()}
    document = {"owner": {target: item.name for target, item in stats.items()}, "counts": counts}
    atomic_save(tensors, path, {KEY: json.dumps(document)})


def load(path: Path, device: str) -> dict[str, Stats]:
    """What `save` kept, on ``device``."""
    entries, metadata = read_header(path)
    document = json.loads(metadata[KEY])
    owned = {}
    for name, (count, readers) in document["counts"].items():
        amax, tokens, total = (
            read_tensor(entries[f"{name}.{part}"]).to(device) for part in ("amax", "tokens", "total")
        )
        owned[name] = Stats(name, amax, tokens, total, count, readers)
    return {target: owned[name] for target, name in document["owner"].items()}


def _part(total: int, index: int, parts: int) -> int:
    """How many of `total` fall to part `index` of `parts`, evenly."""
    return total * (index + 1) // parts - total * index // parts
