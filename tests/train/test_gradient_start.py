"""LoRA that begins along the gradient: the gradient, its singular vectors, and that nothing else changes with it."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dcgen_convert.checkpoint.merge import merge
from dcgen_convert.core.errors import Terminated
from dcgen_convert.core.files import sha256
from dcgen_convert.planning import start
from dcgen_convert.train import gradient_start, lora
from dcgen_convert.train.gradient_start import Gradients, pair_of
from dcgen_convert.train.objective import Sampling, draw, guidance_corrected_loss

from .test_adapt import Hook
from .train_worker import FLUX, Rows, adapt, losses, run_ranks, start_file, tiny_flux

SAMPLING = Sampling("logit-normal", 1.0, (1.0, 5.0), 0.1)


def loss_of(model):
    rows = Rows()
    z0, text = rows.batch(range(6))
    draws = draw(0, 0, range(6), z0.shape[1:], SAMPLING)
    return guidance_corrected_loss(FLUX, model, z0, text, draws, rows.null)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_sums_are_the_gradients_of_the_weights(checkpointing):
    """Against autograd with all weights trained; of two backward passes, as micro-batches are."""
    model = tiny_flux().eval()
    paths = lora.targeted(model, FLUX.lora_targets)
    loss_of(model).backward()
    wanted = {path: 2 * model.get_submodule(path).weight.grad for path in paths}
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("x_embedder", "proj_out")))
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    gradients = Gradients.of(model, paths)
    with gradients.listening():
        loss_of(model).backward()
        loss_of(model).backward()
    loss_of(model).backward()  # nobody listens
    assert wanted.keys() == gradients.sums.keys() | {path for path, value in wanted.items() if not value.any()}
    for path, value in gradients.sums.items():
        torch.testing.assert_close(value, wanted[path], rtol=1e-4, atol=1e-6)
    assert all(model.get_submodule(path).weight.grad is None for path in paths)


def test_the_sums_of_a_convolution_are_its_gradients():
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    model, inputs = nn.Sequential(layer), torch.randn(2, 3, 8, 8)
    layer.weight.requires_grad_(False)
    gradients = Gradients.of(model, ["0"])
    with gradients.listening():
        model(inputs).square().sum().backward()
    layer.weight.requires_grad_(True)
    model(inputs).square().sum().backward()
    torch.testing.assert_close(gradients.sums["0"], layer.weight.grad.flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"), [(24, 40, 4), (40, 24, 4), (300, 260, 4), (12, 40, 8), (5, 40, 8)]
)
def test_a_pair_is_made_of_singular_vectors(outputs, inputs, rank):
    """A0 of the first right ones, B0 of the next left ones (the last, where there are too few), whatever the solver."""
    generator = torch.Generator().manual_seed(3)
    full = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(full, full_matrices=False)
    values = torch.logspace(0, -6, min(outputs, inputs), dtype=torch.float64)
    gradient = (left * values) @ right
    down, up = pair_of(gradient.float(), rank, seed=0)
    count = min(rank, outputs, inputs)
    first = min(count, min(outputs, inputs) - count)
    scale = outputs**0.25 / 4
    for found, goal in ((down / scale, right[:count]), (up.T / scale, left.T[first : first + count])):
        assert found.shape == goal.shape
        cosines = (found.double() * goal).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-3)
    assert torch.equal(down, pair_of(gradient.float(), rank, seed=0)[0])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A phase that began along the gradient: (folder, metrics, trained model without LoRA)."""
    folder = tmp_path_factory.mktemp("begun")
    metrics, model = adapt(folder, start=True, adapt={"ema": 0.0, "objective": "guidance-corrected"}, saving=(5, 0.0))
    return folder, metrics, model


def test_the_first_loss_is_that_of_zero_and_the_next_ones_are_lower(begun, tmp_path):
    folder, _, _ = begun
    adapt(tmp_path, adapt={"ema": 0.0, "objective": "guidance-corrected"})
    ours, zero = losses(folder), losses(tmp_path)
    assert ours[0] == pytest.approx(zero[0], rel=1e-6) and sum(ours[3:]) < sum(zero[3:])


def test_the_export_is_one_lora_of_twice_the_rank_for_merge_and_for_stock_diffusers(begun, tmp_path):
    """The model of the training, the merged weights, and a stock pipeline with the file: one and the same network."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    folder, metrics, _ = begun
    begin, export = load_file(start_file(folder)), Path(metrics["exports"]["lora"])
    modules = load_file(metrics["exports"]["modules"])
    trained = tiny_flux().eval()
    trained.load_state_dict({**trained.state_dict(), **modules})
    lora.add_lora(trained, FLUX.lora_targets, 4, 8.0, seed=0, start=begin)
    state = dict(trained.named_parameters())
    for name, value in load_file(export).items():  # the half that was trained
        path, _, side = name.removeprefix("transformer.").partition(".lora_")
        half = value[:4] if side[0] == "A" else value[:, :4]
        state[f"{path}.lora_{side[0]}.{lora.ADAPTER}.weight"].data.copy_(half)
    tiny_flux().save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "merged", lora=export, modules=Path(metrics["exports"]["modules"]))
    merged = type(trained).from_pretrained(tmp_path / "merged").eval()
    stock = tiny_flux().eval()
    stock.load_state_dict({**stock.state_dict(), **modules})
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, stock)
    pipeline.load_lora_weights(export.parent)
    z0, text = Rows().batch(range(2))
    at = (z0, torch.tensor([0.3, 0.8]), text, torch.ones(2))
    with torch.no_grad():
        found = [FLUX.predict(model, *at) for model in (trained, merged, stock)]
        plain = tiny_flux().eval()
        plain.load_state_dict({**plain.state_dict(), **modules})
        assert (FLUX.predict(plain, *at) - found[0]).abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-6)


def test_a_killed_training_goes_on_to_the_same_bits(begun, tmp_path):
    folder, metrics, _ = begun
    settings = dict(start=True, adapt={"ema": 0.0, "objective": "guidance-corrected"}, saving=(5, 0.0))
    killed = []

    def kill(info):
        if "loss" in info and not killed:
            killed.append(os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(Terminated):
        adapt(tmp_path, console=Hook(kill), **settings)
    assert len(losses(tmp_path)) < 12
    again, _ = adapt(tmp_path, **settings)
    assert again["resumed_from"] and losses(tmp_path) == losses(folder)
    for kind in ("lora", "modules"):
        assert sha256(again["exports"][kind]) == sha256(metrics["exports"][kind])


@pytest.mark.parametrize(
    "changes", [{"zero": 1}, {"zero": 3}, {"zero": 2, "offload": "optimizer"}, {"checkpointing": True}]
)
def test_the_layout_does_not_change_the_curve(begun, tmp_path, changes):
    adapt(tmp_path, start=True, adapt={"ema": 0.0, "objective": "guidance-corrected", **changes})
    assert losses(tmp_path) == pytest.approx(losses(begun[0]), rel=1e-4)


def test_two_ranks_begin_alike_and_learn_what_one_learns(begun, tmp_path):
    shared = {"ema": 0.0, "objective": "guidance-corrected"}
    jobs = [
        {
            "folder": str(tmp_path / str(zero)),
            "start": True,
            "adapt": {**shared, "zero": zero},
            "phase": {"micro_batch": 3},
        }
        for zero in (2, 3)
    ]
    run_ranks(2, jobs, tmp_path / "log.txt")
    for zero in (2, 3):
        assert losses(tmp_path / str(zero)) == pytest.approx(losses(begun[0]), rel=1e-3)


def test_bf16_begins_without_a_jump(tmp_path):
    settings = dict(dtype="bf16", phase={"steps": 2}, adapt={"ema": 0.9})
    metrics, _ = adapt(tmp_path / "a", start=True, **settings)
    adapt(tmp_path / "b", **settings)
    assert losses(tmp_path / "a")[0] == pytest.approx(losses(tmp_path / "b")[0], rel=5e-3)
    begin = load_file(start_file(tmp_path / "a"))
    assert {value.dtype for value in begin.values()} == {torch.bfloat16}
    exported = load_file(metrics["exports"]["lora"])
    for name, value in exported.items():
        path, _, side = name.removeprefix("transformer.").partition(".lora_")
        frozen = value[4:] if side[0] == "A" else -value[:, 4:]
        assert torch.equal(frozen, begin.get(f"{path}.{side[0]}", torch.zeros(())).float().expand_as(frozen))


def test_the_frozen_half_stays_frozen_and_comes_off(begun):
    model = tiny_flux().eval()
    z0, text = Rows().batch(range(2))
    at = (z0, torch.tensor([0.3, 0.8]), text, torch.ones(2))
    begin = load_file(start_file(begun[0]))
    with torch.no_grad():
        before = FLUX.predict(model, *at)
        lora.add_lora(model, FLUX.lora_targets, 4, 8.0, seed=0, start=begin)
        torch.testing.assert_close(FLUX.predict(model, *at), before, rtol=0, atol=1e-6)
        teacher = lora.frozen_teacher(model, ["x_embedder", "proj_out"])
        for _, parameter in lora.trainable(model, []):
            parameter.add_(0.1)
        assert (FLUX.predict(model, *at) - before).abs().max() > 1e-3
        with teacher():
            assert torch.equal(FLUX.predict(model, *at), before)
    training = {name for name, parameter in model.named_parameters() if ".lora_" in name and parameter.requires_grad}
    assert training == {name for name, _ in lora.trainable(model, [])} and len(training) == 2 * 17
    lora.remove_lora(model)
    with torch.no_grad():
        assert torch.equal(FLUX.predict(model, *at), before)


def test_convolutions_begin_along_their_gradients_too():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip
    targets = r".*\.(conv1|conv2|to_q)"
    at = (torch.randn(1, 4, 8, 8), 10, torch.randn(1, 3, 8))
    paths = lora.targeted(unet, targets)
    gradients = Gradients.of(unet, paths)
    with gradients.listening():
        unet(*at).sample.square().mean().backward()
    begin = {}
    for path, value in gradients.sums.items():
        begin[f"{path}.A"], begin[f"{path}.B"] = pair_of(value, 2, 0)
    with torch.no_grad():
        before = unet(*at).sample
        lora.add_lora(unet, targets, 2, 2.0, 0, begin)
        torch.testing.assert_close(unet(*at).sample, before, rtol=0, atol=1e-5)
    layer = unet.get_submodule(next(path for path in paths if path.endswith("conv1")))
    weights = {
        f"x.lora_{side}.default.weight": getattr(layer, f"lora_{side}")["default"].weight.detach() for side in "AB"
    }
    pair = {f"x.{side}": begin[f"{next(p for p in paths if p.endswith('conv1'))}.{side}"] for side in "AB"}
    down, up = lora.joined(weights, pair).values()
    assert down.shape[0] == up.shape[1] == 4 and begin
    torch.testing.assert_close(
        up.flatten(1) @ down.flatten(1), torch.zeros(up.shape[0], down[0].numel()), atol=1e-6, rtol=0
    )


def test_layers_are_summed_in_parts_that_fit(monkeypatch):
    numbers = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 1}
    assert start.groups(numbers, limit=4 * 6) == [["a", "b"], ["c"], ["d", "e"]]
    model = tiny_flux()
    paths = lora.targeted(model, FLUX.lora_targets)
    sizes = {path: model.get_submodule(path).weight.numel() for path in paths}
    assert start.groups(sizes) == [paths]
    assert gradient_start.groups is start.groups
