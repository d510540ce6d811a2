"""Figures and sample grids of a run in training, against values known in closed form."""

from types import SimpleNamespace

import pytest
import torch

from dcgen_convert import families
from dcgen_convert.families.base import REFERENCE
from dcgen_convert.planning.arithmetic import forward_flops
from dcgen_convert.planning.structures import structure
from dcgen_convert.stages.grid import noise_levels, sample
from dcgen_convert.train.meter import Meter, meter_of, peak_flops

from .train_worker import FLUX, SCHEDULER, Rows, tiny_flux


def test_meter_counts_tokens_and_useful_flops(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    model, rows = tiny_flux(), Rows(1)
    adapt = SimpleNamespace(objective="guidance-corrected", checkpointing=True)
    meter = meter_of(FLUX, model, rows.shapes[0], rows.batch([0])[1], adapt, full=False)
    once = forward_flops(structure({**model.config, "_class_name": "FluxTransformer2DModel"}), 16, 3)
    assert meter == Meter(16 + 3, 3 * once, 989e12)  # forward, null prompt, backward; nothing for the recomputation
    monkeypatch.undo()
    figures = meter.read(samples=8, seconds=2.0, devices=4)
    assert figures["tokens_per_s"] == 4 * 19
    assert figures["mfu"] == pytest.approx(8 * 3 * once / 2.0 / (4 * 989e12))
    assert 0.05 < figures["memory_gib"] < 64


def test_meter_counts_the_tokens_of_a_reference(monkeypatch):
    """A reference of twice the picture's width has twice its tokens, and the network computes all of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    model, rows = tiny_flux(), Rows(1)
    adapt = SimpleNamespace(objective="flow", checkpointing=False)
    text = {**rows.batch([0])[1], REFERENCE: torch.zeros(1, *rows.shapes[0]).repeat(1, 1, 1, 2)}
    meter = meter_of(families.get("flux-kontext"), model, rows.shapes[0], text, adapt, full=True)
    once = forward_flops(structure({**model.config, "_class_name": "FluxTransformer2DModel"}), 16 + 32, 3)
    assert meter == Meter(16 + 32 + 3, 3 * once, 989e12)


def test_peaks_by_device_name():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("Some Other Card") is None


@pytest.mark.parametrize("family", [FLUX, families.get("dit")], ids=lambda family: family.name)
def test_sampling_follows_a_straight_flow_to_its_end(family):
    """v = (z - c) / t leads every z to c, whatever the steps; guidance moves the end to c_0 + g (c - c_0)."""
    levels = noise_levels(family, 6, 16, SCHEDULER)
    assert len(levels) == 7 and levels[-1] == 0 and (levels.diff() < 0).all() and levels[0] > 0.99
    start = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    conditioned, null = {"end": torch.tensor(2.0)}, {"end": torch.tensor(-1.0)}

    def velocity(z, t, text, guidance):
        seen.append(guidance.unique().tolist())
        return (z - text["end"]) / t[:, None, None, None]

    for combine, end, inside in ((None, 2.0, 3.5), (family.guided, -1.0 + 3.5 * 3.0, 1.0)):
        seen = []
        z = sample(velocity, start, levels, conditioned, null, 3.5, combine)
        assert torch.allclose(z, torch.full_like(z, end), atol=1e-4)
        assert seen == [[inside]] * (12 if combine else 6)
