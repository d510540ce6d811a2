"""bfloat16 layers that compute in float32 on a CPU without instructions for bfloat16."""

import pytest
import torch
from torch import nn

from dcgen_convert.networks import wide


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(8, 16, 3, padding=1, groups=2), nn.SiLU(), nn.Conv2d(16, 8, 1, bias=False), nn.Linear(12, 5)
    return nn.Sequential(*layers).to(dtype)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def test_a_layer_is_rounded_once(slow):
    """Each layer against the same layer in float64, to half a step of bfloat16; the gradients to 1 %."""
    model, x = network(), torch.randn(2, 8, 12, 12).bfloat16()
    wide.widen(model)
    assert [type(layer) for layer in model] == [wide.WideConv, nn.SiLU, wide.WideConv, wide.WideLinear]
    exact = network().double()
    for mine, theirs in zip(model, exact, strict=True):
        given = x.detach().requires_grad_()
        same = x.detach().double().requires_grad_()
        x, expected = mine(given), theirs(same)
        assert x.dtype is torch.bfloat16
        torch.testing.assert_close(x.double(), expected, rtol=2**-8, atol=1e-6)
        x.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(given.grad.double(), same.grad, rtol=0.01, atol=0.01)


def test_float32_and_fast_processors_are_left_alone(slow, monkeypatch):
    model = network(torch.float32)
    wide.widen(model)
    assert type(model[0]) is nn.Conv2d
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: wide.NATIVE)
    model = network()
    wide.widen(model)
    assert type(model[0]) is nn.Conv2d


def test_names_hooks_and_kinds_stay(slow):
    model, seen = network(), []
    names = list(model.state_dict())
    model[3].register_forward_hook(lambda *_: seen.append(1))
    wide.widen(model)
    model(torch.randn(1, 8, 12, 12).bfloat16())
    assert list(model.state_dict()) == names and seen and isinstance(model[3], nn.Linear)
