"""The written configs against the sigmas that the real schedulers make of them."""

import math

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from dcgen_convert.bundle.scheduler import flux2_shift, scheduler_config
from dcgen_convert.core.errors import InputError
from dcgen_convert.families.shifts import sampling_shift

DYNAMIC = dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config) | {
    "_class_name": "FlowMatchEulerDiscreteScheduler"
}
GRID = numpy.linspace(1.0, 1 / 20, 20)


def shifted(r: float) -> torch.Tensor:
    return torch.tensor(r * GRID / (1 + (r - 1) * GRID), dtype=torch.float32)


def sigmas(config: dict, tokens: int) -> torch.Tensor:
    """What FluxPipeline asks of the scheduler at ``tokens`` image tokens."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    n0, n1, m0, m1 = (config[k] for k in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
    scheduler.set_timesteps(sigmas=GRID, mu=m0 + (m1 - m0) * (tokens - n0) / (n1 - n0))
    return scheduler.sigmas[:-1]


def test_model_keeps_the_base_s_rule():
    assert scheduler_config(DYNAMIC, "model") == {
        key: value for key, value in DYNAMIC.items() if key != "_use_default_values"
    }


@pytest.mark.parametrize(
    "pixels,factor,channels,expected", [(1024, 32, 32, 2.828), (4096, 64, 128, 11.314), (512, 32, 32, 1.414)]
)
def test_flux2_at_one_size(pixels, factor, channels, expected):
    tokens = (pixels // factor) ** 2
    assert flux2_shift(channels, tokens) == pytest.approx(expected, abs=1e-3)
    config = scheduler_config(DYNAMIC, "flux2", channels=channels, tokens=(tokens,))
    assert torch.allclose(sigmas(config, tokens), shifted(flux2_shift(channels, tokens)), atol=1e-6)
    assert sampling_shift(tokens, config) == pytest.approx(
        flux2_shift(channels, tokens)
    )  # what training reads from the same config


def test_flux2_at_two_sizes_is_exact_at_both():
    config = scheduler_config(DYNAMIC, "flux2", channels=32, tokens=(1024, 256))
    assert (config["base_shift"], config["max_shift"]) == pytest.approx((0.3466, 1.0397), abs=1e-4)
    for tokens in (256, 1024):
        assert torch.allclose(sigmas(config, tokens), shifted(flux2_shift(32, tokens)), atol=1e-6)
        assert sampling_shift(tokens, config) == pytest.approx(flux2_shift(32, tokens))


def test_a_number_is_static():
    assert torch.allclose(sigmas(scheduler_config(DYNAMIC, 3), 1024), shifted(3.0), atol=1e-6)
    assert scheduler_config(DYNAMIC, "2.5")["shift"] == 2.5


def test_dpm_solver_takes_the_same_shift():
    base = dict(
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0).config
    )
    config = scheduler_config(
        base | {"_class_name": "DPMSolverMultistepScheduler"}, "flux2", channels=32, tokens=(1024,)
    )
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(20)
    alphas = numpy.linspace(1, 1 / 1000, 21)
    sigma = numpy.flip(1.0 - alphas)[:-1]
    r = math.sqrt(8)
    assert numpy.allclose(scheduler.sigmas[:-1], r * sigma / (1 + (r - 1) * sigma), atol=1e-6)


def test_what_cannot_be_written_is_refused():
    ddim = dict(DDIMScheduler().config) | {"_class_name": "DDIMScheduler"}
    assert scheduler_config(ddim, "model")["_class_name"] == "DDIMScheduler"
    for base, shift, options in (
        (ddim, 2.0, {}),
        (DYNAMIC, "flux3", {}),
        (DYNAMIC, 0.0, {}),
        (DYNAMIC, float("nan"), {}),
        (DYNAMIC, "flux2", {}),
        (DYNAMIC, "flux2", dict(channels=32, tokens=(64, 256, 1024))),
        (DYNAMIC | {"use_dynamic_shifting": False}, "flux2", dict(channels=32, tokens=(256, 1024))),
    ):
        with pytest.raises(InputError):
            scheduler_config(base, shift, **options)
