"""What is kept about the inputs of one linear layer: bounded, whatever the number of calls (after arXiv 2411.05007)."""

import json
import zlib
from pathlib import Path

import torch

from dcgen_convert.checkpoint import headers
from dcgen_convert.svdquant.shards import write_tensors
from dcgen_convert.svdquant.source import read_header

KEY = "stats"  # of a file's metadata


class Stats:
    """Running statistics of a layer's input tokens x (K,).

    amax     (K,) largest magnitude per channel, over all tokens
    tokens   (T, K) at most `samples` tokens, the same share from every call and at most a quarter of it, drawn by a
             seeded generator
    hessian  (K, K) mean of x x^T over `count` other tokens, drawn likewise, at most `hessian_tokens` (0: all)

    `tokens` stay out of the Hessian, so that a choice made with one can be judged with the other; a call of one token
    enters both.
    """

    def __init__(
        self, name: str, channels: int, calls: int, samples: int, hessian_tokens: int, seed: int, device: str = "cpu"
    ):
        self.name, self.readers = name, 0  # readers: how many layers will ask for the Hessian; 0: not known
        self.calls, self.samples, self.hessian_tokens = calls, samples, hessian_tokens
        self.amax = torch.zeros(channels, device=device)
        self._sum = torch.zeros(channels, channels, device=device)
        self._drawn: list[torch.Tensor] = []
        self.count = 0
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))

    def add(self, x: torch.Tensor, call: int) -> None:
        """Take in one call's input x (..., K); `call` counts from 0."""
        x = x.detach().reshape(-1, x.shape[-1])  # (tokens, K)
        order = torch.randperm(x.shape[0], generator=self._generator).to(x.device)
        self.amax = torch.maximum(self.amax, x.abs().amax(0).float())
        kept = min(_share(self.samples, call, self.calls), max(1, x.shape[0] // 4))
        self._drawn.append(x[order[:kept]].float())
        rest = order[kept:] if x.shape[0] > kept else order
        most = _share(self.hessian_tokens, call, self.calls) if self.hessian_tokens else len(rest)
        picked = x[rest[:most]].float()
        self._sum.addmm_(picked.T, picked)
        self.count += picked.shape[0]

    @property
    def tokens(self) -> torch.Tensor:
        return torch.cat(self._drawn)

    def hessian(self, smooth: torch.Tensor) -> torch.Tensor:
        """The Hessian of x / smooth, diag(1/s) H diag(1/s), without another forward pass.

        A copy; but the last of `readers` gets the sum's own memory, 0.9 GB at 15360 channels, and none is left after.
        """
        if self._sum is None:
            raise RuntimeError(f"the Hessian of {self.name} was given away to its last reader")
        self.readers -= 1
        if self.readers == 0:
            scaled, self._sum = self._sum, None
            scaled.div_(smooth[:, None] * max(self.count, 1))
        else:
            scaled = self._sum / (smooth[:, None] * max(self.count, 1))
        return scaled.div_(smooth)


def save(stats: dict[str, Stats], path: Path) -> None:
    """Keep the statistics of a block's targets; layers that share one Stats share it again after `load`."""
    owned = {item.name: item for item in stats.values()}
    parts = {name: {"amax": item.amax, "tokens": item.tokens, "sum": item._sum} for name, item in owned.items()}
    tensors = {f"{name}.{part}": tensor.cpu() for name, held in parts.items() for part, tensor in held.items()}
    counts = {name: [item.count, item.readers] for name, item in owned.items()}
    document = {"owner": {target: item.name for target, item in stats.items()}, "counts": counts}
    write_tensors(path, tensors, {KEY: json.dumps(document)})


def load(path: Path, device: str) -> dict[str, Stats]:
    """What `save` kept; more calls cannot be added to it."""
    document, entries = json.loads(headers.read_header(path)[1][KEY]), read_header(path)
    owned = {}
    for name, (count, readers) in document["counts"].items():
        amax, tokens, total = (entries[f"{name}.{part}"].read().to(device) for part in ("amax", "tokens", "sum"))
        owned[name] = item = Stats.__new__(Stats)
        item.name, item.amax, item.count, item.readers, item._drawn, item._sum = (
            name,
            amax,
            count,
            readers,
            [tokens],
            total,
        )
    return {target: owned[name] for target, name in document["owner"].items()}


def _share(total: int, index: int, parts: int) -> int:
    """How many of `total` fall to part `index` of `parts`, evenly."""
    return total * (index + 1) // parts - total * index // parts
