"""AdamW for everything but the matrices of the blocks, which take orthogonal steps (Muon).

A matrix W with the gradient G has one moment, M <- mu M + G. Its step is

    W <- W - lr 0.6 sqrt(max(rows, columns)) O(G + mu M)

where O is nearly the closest matrix whose singular values are 1, found by Newton-Schulz iterations (Keller Jordan,
"Muon", 2024). With the factor, the root mean square of a step does not depend on the matrix's size (Moonlight, arXiv
2502.16982): 0.6 lr, three times what a usual AdamW step has. At that size the rates that are best for AdamW were best
for the miniatures, so both kinds of steps take the same rate. A convolution's weights count as (out, in * kh * kw).

O needs the whole matrix. ZeRO gives every rank a part of each flat tensor (`state`), and a matrix may lie in several
parts. Then the parts are put together by a sum over the ranks, in buckets, and each rank steps with what it owns. M
stands where AdamW has its first moment: it is sharded, offloaded and written to checkpoints as that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcgen_convert.train import distributed

MOMENTUM = 0.95  # mu, as published
RMS = 0.6  # root mean square of a step at rate 1
ROUNDS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the published iteration: steep at 0, singular values end in 0.7 to 1.2
BUCKET = 1 << 24  # numbers that are summed over the ranks at once
MATRICES = "matrices"  # key of a parameter group: whether it takes orthogonal steps


class Piece(NamedTuple):
    """What a rank holds of a matrix of ``shape``: ``length`` numbers from ``start`` on, at ``place`` in a flat tensor.

    split: whether it takes several ranks to put the matrix together.
    """

    shape: tuple[int, int]
    start: int
    place: int
    length: int
    split: bool

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def orthogonal(matrix: Tensor) -> Tensor:
    """O(``matrix``) (rows, columns), float32: the same singular vectors, singular values near 1. On a GPU in bf16."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.to(torch.bfloat16 if wide.is_cuda else torch.float32)
    x = x / (x.norm() + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide is matrix else x.T).float()


def step_of(matrix: Tensor) -> Tensor:
    """The step that a matrix takes at rate 1, float32."""
    return RMS * max(matrix.shape) ** 0.5 * orthogonal(matrix)


class OrthogonalAdamW(torch.optim.AdamW):
    """AdamW, but orthogonal steps for the parameter groups that say so (`MATRICES`).

    Attributes:
        pieces_of: flat tensor of a group of matrices -> its `Piece` of every matrix of the group, in one order on all
            ranks. To be set before the first step.
        device: where matrices are put together and orthogonalised.
    """

    pieces_of: Callable[[Tensor], Sequence[Piece]]
    device: torch.device

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        chosen = [(group, group["params"]) for group in self.param_groups if group[MATRICES]]
        for group, _ in chosen:
            group["params"] = []
        try:
            result = super().step(closure)
        finally:
            for group, partitions in chosen:
                group["params"] = partitions
        for group, partitions in chosen:
            for partition in partitions:
                if partition.grad is not None:
                    self._turn(partition, group["lr"], group["weight_decay"])
        return result

    def _turn(self, partition: Tensor, lr: float, weight_decay: float) -> None:
        """One step of all matrices of a flat tensor."""
        state = self.state[partition]
        moment, gradient = state["exp_avg"].view(-1), partition.grad
        assert gradient is not None, "the caller has looked"
        flat = gradient.to(moment.dtype).reshape(-1)
        moment.mul_(MOMENTUM).add_(flat)
        flat = flat.add(moment, alpha=MOMENTUM)
        for pieces in buckets(self.pieces_of(partition)):
            self._replace(flat, pieces)
        state["step"] += 1
        partition.mul_(1 - lr * weight_decay).add_(flat.view_as(partition), alpha=-lr)

    def _replace(self, flat: Tensor, pieces: Sequence[Piece]) -> None:
        """Put steps in the place of the directions that ``flat`` holds of these matrices."""
        whole = torch.zeros(sum(piece.numel for piece in pieces), device=self.device)
        matrices = whole.split([piece.numel for piece in pieces])
        for piece, matrix in zip(pieces, matrices, strict=True):
            matrix[piece.start : piece.start + piece.length] = flat[piece.place : piece.place + piece.length]
        if pieces[0].split:
            distributed.summed(whole)
        for piece, matrix in zip(pieces, matrices, strict=True):
            if piece.length:
                step = step_of(matrix.view(piece.shape)).reshape(-1)
                flat[piece.place : piece.place + piece.length] = step[piece.start : piece.start + piece.length]


def buckets(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are put together at once. First those of split matrices, the same on all ranks; then this rank's."""
    split, own = [], []
    for piece in pieces:
        if piece.split:
            split.append(piece)
        elif piece.length:
            own.append(piece)
    yield from _filled(split)
    yield from _filled(own)


def _filled(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Neighbours together, as long as they hold no more than `BUCKET` numbers."""
    bucket: list[Piece] = []
    for piece in pieces:
        if bucket and sum(other.numel for other in bucket) + piece.numel > BUCKET:
            yield bucket
            bucket = []
        bucket.append(piece)
    if bucket:
        yield bucket
