"""The engine against a plain PyTorch loop, and its exports, averages and refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcgen_convert.core.errors import CheckFailed, InternalError, RecipeError
from dcgen_convert.train import engine
from dcgen_convert.train.engine import Engine, check_export
from dcgen_convert.train.objective import Sampling, draw, flow_loss

from .train_worker import FLUX, Rows, engine_settings, tiny_flux

SAMPLING = Sampling("logit-normal", 1.0, (1.0, 5.0), 0.0)


def chosen(model):
    """Trained part of the tiny model: attention, embedder, head."""
    picked = (".attn.", "x_embedder")
    return [(n, p) for n, p in model.named_parameters() if any(x in n for x in picked) or n.startswith("proj_out")]


def micro_batch(step: int, samples=range(4)):
    rows = Rows()
    z0, text = rows.batch([(7 * step + i) % len(rows) for i in samples])
    return z0, text, draw(0, step, samples, z0.shape[1:], SAMPLING), rows.null


def loss_with(model):
    return lambda batch: flow_loss(FLUX, model, *batch)


def clip_like_deepspeed(parameters, limit: float) -> float:
    """DeepSpeed's clipping: norm summed in float64, gradients times 1 / max(1, (norm + 1e-6) / limit)."""
    norm = torch.stack([torch.linalg.vector_norm(p.grad.double()) for p in parameters]).pow(2).sum().float().sqrt()
    scale = torch.clamp((norm + 1e-6) / limit, min=1.0)
    for parameter in parameters:
        parameter.grad.mul_(1.0 / scale)
    return norm.item()


def plain_loop(settings, steps: int):
    """Reference without DeepSpeed: losses, gradient norms and weights after ``steps``."""
    model = tiny_flux().eval()
    named = chosen(model)
    parameters = [p for _, p in named]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in parameters))
    adam = torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, settings.rate_factor)
    losses, norms = [], []
    for step in range(steps):
        loss = loss_with(model)(micro_batch(step))
        loss.backward()
        if settings.clip:
            norms.append(clip_like_deepspeed(parameters, settings.clip))
        adam.step()
        adam.zero_grad()
        rate.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in named}


def engine_loop(settings, steps: int):
    model = tiny_flux()
    engine = Engine(model, chosen(model), settings)
    per = engine.micro_batch
    batches = [range(i, i + per) for i in range(0, settings.batch, per)]
    records = [
        engine.step(loss_with(model), [micro_batch(step, samples) for samples in batches]) for step in range(steps)
    ]
    weights = dict(engine.tensors("param"))
    engine.close()
    return records, weights


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_zero2_fp32_is_bitwise_the_plain_loop(clip):
    settings = engine_settings(clip=clip, weight_decay=0.0)
    losses, norms, weights = plain_loop(settings, 50)
    records, trained = engine_loop(settings, 50)
    assert [record.loss for record in records] == losses
    if clip:
        assert [record.grad_norm for record in records] == norms
        assert max(norms) > clip  # clipping was at work
    assert all(torch.equal(trained[name], weights[name]) for name in weights)
    assert any(not torch.equal(weights[n], p) for n, p in chosen(tiny_flux()))


@pytest.mark.parametrize(
    "changes", [{"zero": 0}, {"zero": 1}, {"zero": 3}, {"checkpointing": True}, {"micro_batch": 2}]
)
def test_other_layouts_train_alike(changes):
    losses, _, weights = plain_loop(engine_settings(), 20)
    records, trained = engine_loop(engine_settings(**changes), 20)
    assert max(abs(r.loss - loss) for r, loss in zip(records, losses, strict=True)) < 2e-6
    assert max((trained[n] - weights[n]).abs().max() for n in weights) < 2e-5


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_follows_fp32(zero):
    losses, _, _ = plain_loop(engine_settings(), 20)
    records, _ = engine_loop(engine_settings(dtype="bf16", zero=zero), 20)
    assert max(abs(r.loss - loss) for r, loss in zip(records, losses, strict=True)) < 3e-2


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_average_follows_the_weights(zero):
    settings = engine_settings(zero=zero, ema=0.9)
    model = tiny_flux()
    engine = Engine(model, chosen(model), settings)
    expected = {name: p.detach().clone() for name, p in engine.tensors("param")}
    for step in range(4):
        engine.step(loss_with(model), [micro_batch(step)])
        decay = settings.ema_decay(step)
        expected = {n: decay * expected[n] + (1 - decay) * p for n, p in engine.tensors("param")}
    weights, average = dict(engine.tensors("param")), engine.ema
    loss = loss_with(model)
    with torch.no_grad():
        live = loss(micro_batch(9)).item()
        with engine.averaged():
            shown = loss(micro_batch(9)).item()
        after = loss(micro_batch(9)).item()
    again = dict(engine.tensors("param"))
    engine.close()
    assert all(torch.allclose(average[n], expected[n], atol=1e-6) for n in expected)
    assert after == live and all(torch.equal(weights[n], again[n]) for n in weights)
    reference = tiny_flux().eval()
    reference.load_state_dict({**reference.state_dict(), **expected})
    assert shown == pytest.approx(flow_loss(FLUX, reference, *micro_batch(9)).item(), abs=1e-5)
    assert abs(shown - live) > 1e-5


def test_average_starts_short():
    settings = engine_settings(ema=0.999)
    decays = [settings.ema_decay(step) for step in range(20000)]
    assert decays[0] == pytest.approx(2 / 11) and decays[-1] == 0.999 and decays == sorted(decays)


def test_engines_follow_one_another_on_one_model():
    model = tiny_flux()
    first = Engine(
        model, [(n, p) for n, p in model.named_parameters() if n.startswith("x_embedder")], engine_settings()
    )
    first.step(loss_with(model), [micro_batch(0)])
    first.close()
    embedder = model.x_embedder.weight.detach().clone()
    second = Engine(model, [(n, p) for n, p in model.named_parameters() if n.startswith("proj_out")], engine_settings())
    second.step(loss_with(model), [micro_batch(1)])
    second.close()
    assert torch.equal(embedder, model.x_embedder.weight)
    assert not torch.equal(model.proj_out.weight, tiny_flux().proj_out.weight)
    assert all(p.grad is None for p in model.parameters())


def test_zero3_leaves_no_patch_behind():
    """DeepSpeed replaces torch.nn.functional.linear for ZeRO 3.

    What trains afterwards in this process must not see it.
    """
    linear = torch.nn.functional.linear
    model = tiny_flux()
    engine = Engine(model, chosen(model), engine_settings(zero=3))
    assert torch.nn.functional.linear is not linear
    engine.close()
    assert torch.nn.functional.linear is linear


@pytest.mark.parametrize("zero", [2, 3])
def test_zero3_puts_the_buffers_where_it_computes(zero, monkeypatch):
    """DeepSpeed moves the buffers of a model for the other stages only."""
    moved, model = [], tiny_flux()
    monkeypatch.setattr(engine, "move_buffers", lambda *arguments: moved.append(arguments))
    made = Engine(model, chosen(model), engine_settings(zero=zero))
    made.close()
    assert moved == ([(model, torch.device("cpu"))] if zero == 3 else [])


def test_bad_loss_leaves_the_weights():
    model = tiny_flux()
    engine = Engine(model, chosen(model), engine_settings())
    engine.step(loss_with(model), [micro_batch(0)])
    before = dict(engine.tensors("param"))
    with pytest.raises(CheckFailed, match="step 1 is nan"):
        engine.step(lambda batch: loss_with(model)(batch) * float("nan"), [micro_batch(1)])
    assert all(torch.equal(before[n], p) for n, p in engine.tensors("param"))
    engine.close()


def test_exports_are_checked():
    good = torch.ones(2, 3)
    check_export("w", good, (2, 3))
    for bad, shape in [(torch.ones(0), (2, 3)), (good, (3, 2)), (good * float("inf"), (2, 3))]:
        with pytest.raises(CheckFailed, match="export: w"):
            check_export("w", bad, shape)


def test_wrong_number_of_micro_batches_is_refused():
    model = tiny_flux()
    engine = Engine(model, chosen(model), engine_settings(micro_batch=2))
    with pytest.raises(InternalError, match="takes 2 micro-batches"):
        engine.step(loss_with(model), [micro_batch(0)])
    engine.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero": 0, "dtype": "bf16"}, "stage 0 trains differently"),
        ({"zero": 4}, "zero must be"),
        ({"zero": 1, "offload": "optimizer"}, "offload needs"),
        ({"zero": 2, "offload": "all"}, "offload all needs"),
        ({"dtype": "fp16"}, "dtype must"),
        ({"ema": 1.0}, "ema is a decay"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        engine_settings(**changes)


def test_global_batch_is_kept_whatever_the_ranks():
    settings = engine_settings(batch=12, micro_batch=5)
    assert settings.split(1) == (4, 3) and settings.split(2) == (3, 2) and settings.split(3) == (4, 1)
    with pytest.raises(RecipeError, match="cannot be shared by 5 ranks"):
        settings.split(5)


def test_schedule():
    constant = engine_settings(lr=1.0, warmup=4, schedule="constant")
    assert [constant.learning_rate(step) for step in (0, 1, 3, 4, 40)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = engine_settings(lr=1.0, warmup=10, schedule="cosine", steps=50)
    assert cosine.learning_rate(30) == pytest.approx(0.5) and cosine.learning_rate(50) == pytest.approx(0.0)


def test_bring_up_is_quiet_and_needs_no_compiler(tmp_path):
    """Nothing on stdout or stderr, no environment left for children, no C++ build with an empty PATH, and torch's own
    compiler is there to use, but not imported.
    """
    program = (
        "import os, sys, torch; compile = torch.compile;"
        "from dcgen_convert.train.engine import Engine; from train_worker import *;"
        "m = tiny_flux(); e = Engine(m, list(m.named_parameters()), engine_settings()); e.close();"
        "assert not {'RANK', 'WORLD_SIZE', 'MASTER_PORT'} & set(os.environ);"
        "assert torch.compile is compile and 'torch._inductor.compile_fx' not in sys.modules"
    )
    here = Path(__file__)
    environment = {key: v for key, v in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PATH": "/nonexistent", "PYTHONPATH": f"{here.parents[2]}:{here.parent}", "OMP_NUM_THREADS": "1"}
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())
