"""Orthogonal steps: against a float64 reference, in every layout of ZeRO, and what trains without them."""

import pytest
import torch

from dcgen_convert.train import phases
from dcgen_convert.train.engine import Engine
from dcgen_convert.train.orthogonal import Piece, buckets, orthogonal, step_of

from .test_engine import chosen, clip_like_deepspeed, loss_with, micro_batch
from .train_worker import FLUX, engine_settings, tiny_flux

STEPS = 3


def polynomial(matrix):
    """The published iteration as a polynomial of the singular values, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right, values


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (24, 24), (1, 16)])
def test_singular_vectors_stay_and_singular_values_become_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    wanted, values = polynomial(matrix)
    torch.testing.assert_close(orthogonal(matrix).double(), wanted, rtol=1e-4, atol=1e-5)
    assert values.median() > 0.65 and values.max() < 1.25  # what was far below the others stays below them


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (128, 128)])
def test_a_step_has_one_size_for_every_shape(shape):
    step = step_of(torch.randn(shape, generator=torch.Generator().manual_seed(4)))
    assert step.square().mean().sqrt().item() == pytest.approx(0.6, rel=0.2)


def matrices_of(model):
    return phases._matrices(FLUX, chosen(model))


def plain_loop(settings):
    """Weights after STEPS, without the engine: float64 orthogonal steps, and AdamW for what is no matrix of a block."""
    model = tiny_flux().eval()
    named, names = chosen(model), matrices_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for _, p in named))
    rest = [p for name, p in named if name not in names]
    adam = torch.optim.AdamW(rest, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=0.0)
    moments = {name: 0.0 for name in names}
    for step in range(STEPS):
        loss_with(model)(micro_batch(step)).backward()
        clip_like_deepspeed([p for _, p in named], settings.clip)
        rate = settings.learning_rate(step)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        with torch.no_grad():
            for name, p in named:
                if name in names:
                    moments[name] = 0.95 * moments[name] + p.grad
                    direction, _ = polynomial(p.grad + 0.95 * moments[name])
                    p.sub_((rate * 0.6 * max(p.shape) ** 0.5 * direction).float())
        model.zero_grad()
    return {name: p.detach() for name, p in named}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_weights_are_those_of_a_plain_loop(zero):
    settings = engine_settings(zero=zero, optimizer="muon", clip=0.5, lr=3e-3)
    model = tiny_flux()
    engine = Engine(model, chosen(model), settings, matrices_of(model))
    per = engine.micro_batch
    try:
        for step in range(STEPS):
            parts = [micro_batch(step, range(start, start + per)) for start in range(0, settings.batch, per)]
            engine.step(loss_with(model), parts)
        weights = dict(engine.tensors("param"))
    finally:
        engine.close()
    for name, wanted in plain_loop(settings).items():
        torch.testing.assert_close(weights[name], wanted, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_linears_of_blocks_are_matrices_and_nothing_else_is():
    model = tiny_flux()
    named = list(model.named_parameters())
    names = phases._matrices(FLUX, named)
    assert "transformer_blocks.0.attn.to_q.weight" in names and "single_transformer_blocks.0.proj_mlp.weight" in names
    outside = {"x_embedder.weight", "proj_out.weight", "context_embedder.weight", "transformer_blocks.0.attn.to_q.bias"}
    assert outside <= {name for name, _ in named} and not outside & names
    assert all(p.ndim == 2 for name, p in named if name in names)


def test_split_matrices_come_first_and_alike_on_every_rank():
    """The sums over the ranks must meet: what a rank holds alone lies in no bucket of the others."""
    whole = Piece((2, 3), 0, 0, 6, False)
    elsewhere = Piece((2, 3), 0, 0, 0, False)
    split = [Piece((4, 5), 0, 6, 12, True), Piece((4, 5), 0, 0, 0, True)]
    first = list(buckets([whole, split[0], elsewhere, split[1]]))
    second = list(buckets([elsewhere, split[0], whole, split[1]]))
    assert first[0] == second[0] == split and first[1] == second[1] == [whole] and len(first) == 2
