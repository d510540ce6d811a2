"""One layer through the whole pipeline: better than its parts, honest about its errors, and refused when it cannot be
held.
"""

import pytest
import torch

from dcgen_convert.core.errors import InputError
from dcgen_convert.svdquant import layer as layer_module
from dcgen_convert.svdquant import smooth as smooth_module
from dcgen_convert.svdquant.awq import quantize_awq
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.smooth import candidate, search
from dcgen_convert.svdquant.weights import round_to_nearest

from .reference import quantize_linear, stats_of


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def layer_problem(n=256, k=384):
    """Correlated inputs with outlier channels, a decaying spectrum, and tokens the statistics never saw."""
    g = generator(0)
    spectrum = (
        torch.randn(n, 24, generator=g)
        @ torch.diag(torch.arange(1, 25).float() ** -1.0)
        @ torch.randn(24, k, generator=g)
    )
    weight = 0.02 * (torch.randn(n, k, generator=g) + 0.5 * spectrum)
    channels = torch.ones(k)
    channels[torch.randperm(k, generator=g)[:6]] = 20
    x = (
        torch.randn(1500, k, generator=g) + 0.3 * torch.randn(1500, 12, generator=g) @ torch.randn(12, k, generator=g)
    ) * channels
    return weight, stats_of(x[:1000]), x[1000:]


def error(layer, weight, x):
    return ((layer.output(x) - x @ weight.T).norm() / (x @ weight.T).norm()).item()


STEPS = ("smoothing", "gptq", "scale search", "refits")


def leave_out(patch, steps):
    """Take steps out of the quantisation of a layer."""
    if "smoothing" in steps:
        patch.setattr(smooth_module, "COARSE", ())
        patch.setattr(smooth_module, "MIXED", ())
    if "gptq" in steps:
        patch.setattr(layer_module, "gptq", lambda weight, lower, *scales: round_to_nearest(weight, *scales))
    if "scale search" in steps:
        patch.setattr(layer_module, "search_factor", lambda *args: None)
    if "refits" in steps:
        patch.setattr(layer_module, "REFITS", 0)


@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
def test_every_step_earns_its_place(precision):
    weight, stats, held = layer_problem()
    errors = []
    for first in range(len(STEPS) + 1):
        with pytest.MonkeyPatch.context() as patch:
            leave_out(patch, STEPS[first:])
            settings = QuantSettings(rank=16, precision=precision)
            layer = quantize_linear("m", weight, None, stats, settings, generator())
        errors.append(error(layer, weight, held))
    assert errors[1] < 0.8 * errors[0]
    assert errors[4] < errors[3] < errors[2] < errors[1]


def test_the_record_tells_the_truth():
    weight, stats, held = layer_problem()
    layer = quantize_linear("m", weight, None, stats, QuantSettings(rank=16), generator())
    assert layer.record["error"] == pytest.approx(error(layer, weight, held), rel=0.1)
    assert layer.record["error"] < 0.6 * layer.record["error_rtn"]
    assert layer.record["shape"] == [256, 384] and layer.record["candidates"] >= 20
    wanted = ((layer.dense() - weight).norm() / weight.norm()).item()
    assert layer.record["weight_error"] == pytest.approx(wanted, rel=1e-5)


def test_what_is_kept_is_what_the_file_can_hold():
    weight, stats, _ = layer_problem()
    layer = quantize_linear("m", weight, torch.randn(256), stats, QuantSettings(rank=16), generator())
    assert layer.up.dtype == layer.down.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.smooth.to(torch.bfloat16).float(), layer.smooth)


def test_data_free_is_smoothing_free_and_beats_rounding_on_the_weight():
    weight, _, _ = layer_problem()
    layer = quantize_linear("m", weight, None, None, QuantSettings(calibration="none", rank=16), generator())
    assert bool((layer.smooth == 1).all()) and "error" not in layer.record
    assert layer.record["weight_error"] < 0.85 * layer.record["weight_error_rtn"]


def test_one_calibration_token_is_enough_but_none_is_held_out_for_an_error():
    weight, _, held = layer_problem()
    stats = stats_of(held[:1])
    layer = quantize_linear("m", weight, None, stats, QuantSettings(rank=16), generator())
    assert error(layer, weight, held[:1]) < 0.3 and "error" not in layer.record and layer.record["weight_error"] > 0


def test_identity_is_always_a_candidate_and_wins_where_it_should():
    g = generator(2)
    weight = torch.randn(128, 128, generator=g)
    tokens = torch.randn(128, 128, generator=g).sign()  # constant magnitude: nothing to smooth, and nothing lost
    found = search(weight, tokens.abs().amax(0), tokens, QuantSettings(rank=16), generator())
    assert found.tried >= 19
    assert found.error <= 1.0 and torch.isfinite(found.factor).all()
    assert torch.equal(candidate(tokens.abs().amax(0), weight.abs().amax(0), tokens, 0.0, 0.0), torch.ones(128))


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
def test_smoothed_inputs_have_magnitude_one(magnitude):
    _, stats, _ = layer_problem()
    tokens = magnitude * stats.tokens
    for alpha, beta in ((0.0, 0.0), (0.5, 0.0), (0.7, 0.3)):
        factor = candidate(magnitude * stats.amax, torch.rand(384, generator=generator()), tokens, alpha, beta)
        assert 0.65 < (tokens / factor).square().mean().sqrt() < 1.5


def test_dead_inputs_and_zero_weights_stay_finite():
    weight, stats, held = layer_problem()
    weight[:, 5] = 0
    for statistics in (stats, stats_of(torch.zeros(100, 384))):
        layer = quantize_linear("m", weight, None, statistics, QuantSettings(rank=16), generator())
        assert torch.isfinite(layer.output(held)).all()
    silent = quantize_linear("m", torch.zeros(128, 384), None, stats, QuantSettings(rank=16), generator())
    assert silent.dense().abs().max() == 0


@pytest.mark.parametrize("shape, word", [((127, 256), "127 out"), ((256, 129), "129 in"), ((64, 128), "64 out")])
def test_sides_off_128_are_refused_by_name(shape, word):
    with pytest.raises(InputError, match=rf"blocks\.0\.to_q\.weight.*{word} channels"):
        quantize_linear("blocks.0.to_q", torch.zeros(shape), None, None, QuantSettings(), generator())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_nan_and_infinity_are_refused_by_name(value, part):
    weight, bias = torch.zeros(128, 128), torch.zeros(128)
    (weight if part == "weight" else bias).view(-1)[3] = value
    with pytest.raises(InputError, match=rf"blocks\.0\.to_q\.{part} holds 1 NaN"):
        quantize_linear("blocks.0.to_q", weight, bias, None, QuantSettings(), generator())
    with pytest.raises(InputError, match=rf"mod\.{part} holds 1 NaN"):
        quantize_awq("mod", weight, bias)


@pytest.mark.parametrize(
    "field, value",
    [("rank", 24), ("rank", 8), ("rank", 2048), ("precision", "fp8"), ("calibration", "some")],
)
def test_settings_refuse_what_the_format_has_not(field, value):
    with pytest.raises(InputError, match=field):
        QuantSettings(**{field: value})
