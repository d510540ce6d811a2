"""Every family's network on a pretend device: what a family makes itself (time, positions, masks) is on the device
of its inputs.
"""

import copy

import pretend_device
import pytest
import torch

from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.networks import autoencoders, models, pipelines
from dcgen_convert.train.objective import Sampling, draw, flow_loss, to_device, velocity

from .tiny_models import TINY


@pytest.mark.parametrize("name", TINY)
def test_loss_gradient_and_velocity_are_the_same_on_a_device(name, tmp_path):
    entry = TINY[name]
    entry.build(tmp_path / "source")
    source = load_source(name, str(tmp_path / "source"))
    family, model = source.family, models.load(source.transformer, torch.float32)
    encoders = pipelines.load_text_encoders(source, torch.float32)
    text, null = (
        pipelines.encode_text(family, encoders, prompts, entry.length) for prompts in ([entry.prompt] * 2, [""])
    )
    shape = (autoencoders.load(source.vae).channels, *[entry.side // entry.factor] * 2)
    common = dict(shift=1.0, guidance_range=(1.0, 5.0), text_drop=0.5)
    kind = ("ddpm", family.noise_times()) if family.prediction == "epsilon" else ("logit-normal", None)
    draws = draw(0, 0, range(2), shape, Sampling(kind[0], times=kind[1], **common))
    batch = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)), text, draws

    def results(network, z0, text, draws):
        weight = network.get_submodule(family.embedder).weight.requires_grad_()
        loss = flow_loss(family, network, z0, text, draws, null)
        loss.backward()
        with torch.no_grad():
            v = velocity(family, network, z0, draws.t, text, draws.guidance)
        return [value.detach().cpu() for value in (loss, weight.grad, v)]

    here = results(copy.deepcopy(model), *batch)
    with pretend_device.ready() as device:
        there = results(model.to(device), *to_device(batch, device))
    for mine, wanted in zip(there, here, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)
