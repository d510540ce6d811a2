"""What is kept about the inputs of one linear layer: bounded, whatever the number of calls (after arXiv 2411.05007)."""

import zlib

import torch


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


def _share(total: int, index: int, parts: int) -> int:
    """How many of `total` fall to part `index` of `parts`, evenly."""
    return total * (index + 1) // parts - total * index // parts
