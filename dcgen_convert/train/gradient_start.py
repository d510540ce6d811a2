"""Where LoRA begins: not at zero, but along the gradient of the loss (LoRA-GA, arXiv 2407.05000).

G is the gradient of the mean loss over a few batches with respect to a weight W, (out, in), with G = U S V'. LoRA of
rank r begins with

    A0 = c (first r columns of V)', B0 = c (next r columns of U), c = out^(1/4) / sqrt(gamma)

and the model computes with W + s (B A - B0 A0), s = alpha / r. So its output is unchanged at first, and its first steps
go where full tuning would go. W itself is never changed: -B0 A0 is a second, frozen LoRA beside the one that trains
(`lora.add_lora`). In 16 bits a shift of W would be lost in rounding. What is exported is one LoRA of rank 2 r.

The weights do not train while G is summed: the engine does its steps at rate 0. The sums are float32, for as many
targets at a time as GROUP bytes hold. So there is never a gradient of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from dcgen_convert.core import clock, pulse
from dcgen_convert.core.console import NULL
from dcgen_convert.planning.start import BATCHES, groups
from dcgen_convert.train import distributed
from dcgen_convert.train.engine import Engine
from dcgen_convert.train.loop import Goal, Place, positions_of
from dcgen_convert.train.objective import draw, to_device
from dcgen_convert.train.order import BatchOrder
from dcgen_convert.train.state import true_shape

GAMMA = 16.0  # of the scale c, as published
SPARE = 32  # columns that the randomised SVD takes beyond those that are used


class _Noted(torch.autograd.Function):
    """The identity on the output of a layer. Its backward pass gives ``note`` the input and the output's gradient.

    The input is saved the way autograd saves it, so that it is recomputed where activations are checkpointed.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, note: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.note = note
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.note(ctx.saved_tensors[0], gradients[0])
        return gradients[0], None, None


@dataclass
class Gradients:
    """Sums of the gradients of the loss with respect to the weights of some layers, which themselves are frozen.

    Attributes:
        layers: path -> linear or convolution.
        sums: path -> (out, in) or (out, in * kh * kw) float32; of all backward passes inside `listening`.
    """

    layers: Mapping[str, nn.Linear | nn.Conv2d]
    sums: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, paths: Sequence[str]) -> Gradients:
        layers = {path: model.get_submodule(path) for path in paths}
        return cls({path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)}, {})

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Every backward pass inside adds to the sums."""
        hooks = [layer.register_forward_hook(partial(self._watch, path)) for path, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, path: str, _layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # the prediction for the null prompt
            return None
        if not output.requires_grad:  # nothing before it trains: the first layers that see the text alone
            output.requires_grad_()
        noted: Tensor = _Noted.apply(output, args[0], partial(self._add, path))
        return noted

    @torch.no_grad()
    def _add(self, path: str, inputs: Tensor, gradient: Tensor) -> None:
        found = weight_gradient(self.layers[path], inputs, gradient)
        if path in self.sums:
            self.sums[path] += found
        else:
            self.sums[path] = found.float()


def weight_gradient(layer: nn.Linear | nn.Conv2d, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the weight, (out, in) or (out, in * kh * kw), from the layer's input and its output's gradient."""
    if isinstance(layer, nn.Linear):
        return gradient.flatten(0, -2).T @ inputs.flatten(0, -2)
    assert not isinstance(layer.padding, str), "a convolution of diffusers names its padding in numbers"
    shape = true_shape(layer.get_parameter("weight"))
    return conv2d_weight(inputs, shape, gradient, layer.stride, layer.padding, layer.dilation, layer.groups).flatten(1)


def pair_of(gradient: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """(A0 (k, in), B0 (out, k)) float32 of one gradient (out, in); k <= rank: a small weight has no more directions.

    B0 takes the k left singular vectors after the first k; where there are fewer than 2 k in all, the last k.
    """
    outputs, inputs = gradient.shape
    most = min(outputs, inputs)
    count, wanted = min(rank, most), 2 * rank + SPARE
    if 2 * wanted < most:
        with torch.random.fork_rng(devices=[gradient.device] if gradient.is_cuda else []):
            torch.manual_seed(seed)
            left, _, right = torch.svd_lowrank(gradient, wanted, niter=2)
    else:
        left, _, transposed = torch.linalg.svd(gradient, full_matrices=False)
        right = transposed.T
    first = min(count, left.shape[1] - count)
    scale = outputs**0.25 / GAMMA**0.5
    return scale * right[:, :count].T, scale * left[:, first : first + count]


def measured(engine: Engine, goal: Goal, place: Place, paths: Sequence[str], rank: int) -> dict[str, Tensor]:
    """A0 and B0 of every layer as "PATH.A" and "PATH.B", in the model's dtype on the CPU. Collective.

    A layer that the loss does not depend on has none.

    Args:
        engine: trains embedder and head at rate 0; its batches are those of the first steps.
        paths: of the layers that get LoRA.
        rank: of the LoRA.
    """
    model, result = engine.model, dict[str, Tensor]()
    parts = groups({path: true_shape(model.get_submodule(path).weight).numel() for path in paths})
    console = place.console if engine.rank == 0 else NULL
    with console.progress("LoRA start", BATCHES * len(parts), "batch") as bar:
        for part in parts:
            gradients = Gradients.of(model, part)
            with gradients.listening():
                for step in range(BATCHES):
                    with clock.timed("start", engine.micro_batch * engine.accumulation):
                        engine.step(partial(_loss, engine, goal, place.seed, step), positions_of(engine))
                    bar.advance(1)
            for path in sorted(gradients.sums):
                pulse.bump()
                total = distributed.summed(gradients.sums.pop(path))
                pair = pair_of(total, rank, place.seed)
                result |= {
                    f"{path}.{side}": found.to(model.dtype).cpu() for side, found in zip("AB", pair, strict=True)
                }
    return {name: value.contiguous() for name, value in result.items()}


def _loss(engine: Engine, goal: Goal, seed: int, step: int, positions: Sequence[int]) -> Tensor:
    """Loss of a micro-batch of step ``step``, at these positions in the batch."""
    rows = BatchOrder(goal.samples.spans, engine.settings.batch, seed).rows_of(step)
    z0, text = goal.samples.batch([rows[position] for position in positions])
    draws = draw(seed, step, positions, z0.shape[1:], goal.sampling(z0.shape[1:]))
    return goal.loss_of(*to_device((z0, text, draws), engine.device))
