"""The losses against hand-written references, and the draws behind them."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dcgen_convert import families
from dcgen_convert.train import lora
from dcgen_convert.train.objective import (
    EVALUATION,
    Draws,
    Sampling,
    bell,
    consistency_loss,
    draw,
    drop_text,
    evaluate_loss,
    flow_loss,
    guidance_corrected_loss,
    shift_t,
    t_of_normal,
    velocity,
)
from dcgen_convert.train.phases import sampling_of

from .train_worker import FLUX, SCHEDULER, Rows, adapt_section, tiny_flux

SAMPLING = Sampling("logit-normal", 2.0, (1.5, 4.0), 0.4)
SHAPE = (8, 4, 4)


def batch(count=6, step=3):
    rows = Rows()
    z0, text = rows.batch(range(count))
    return z0, text, draw(7, step, range(count), SHAPE, SAMPLING), rows.null


def by_hand(model, null_model, z0, text, draws, null, shown=1.0):
    """v_hat sample by sample: of arXiv 2509.25180 for ``shown`` = 1, else for pictures drawn with that guidance."""
    errors = []
    for i in range(len(z0)):
        t, g, eps = draws.t[i], draws.guidance[i], draws.eps[i]
        z = ((1 - t) * z0[i] + t * eps)[None]
        condition = null if draws.dropped[i] else {key: value[i : i + 1] for key, value in text.items()}
        v_g = FLUX.predict(model, z, t[None], condition, g[None])
        v_0 = FLUX.predict(null_model, z, t[None], null, torch.ones(1))
        v_c = (v_g - (1 - g) * v_0) / g
        errors.append((v_0 + shown * (v_c - v_0) - (eps - z0[i])).square().mean())
    return torch.stack(errors).mean()


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shown", [1.0, 3.5])
def test_guidance_corrected_loss_is_the_written_one(shown):
    """Value and gradient; the null branch has no gradient, as if it were another network."""
    model = tiny_flux().eval()
    z0, text, draws, null = batch()
    assert 0 < draws.dropped.sum() < len(z0)
    loss = guidance_corrected_loss(FLUX, model, z0, text, draws, null, data_guidance=shown)
    reference = by_hand(model, copy.deepcopy(model), z0, text, draws, null, shown)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    ours, theirs = gradients(loss, model), gradients(reference, model)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6, rtol=1e-4) for name in theirs)


def test_frozen_teacher_is_the_model_before_training():
    model, z0, text, draws, null = tiny_flux().eval(), *batch()
    before = copy.deepcopy(model)
    lora.add_lora(model, FLUX.lora_targets, 4, 8.0, seed=0)
    teacher = lora.frozen_teacher(model, ["x_embedder", "proj_out"])
    with torch.no_grad():  # some training
        for name, parameter in lora.trainable(model, ["x_embedder", "proj_out"]):
            parameter.requires_grad_(True).add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            )
    loss = guidance_corrected_loss(FLUX, model, z0, text, draws, null, teacher)
    assert loss.item() == pytest.approx(by_hand(model, before, z0, text, draws, null).item(), rel=1e-5)
    assert abs(loss.item() - guidance_corrected_loss(FLUX, model, z0, text, draws, null).item()) > 1e-3
    loss.backward()
    trained = dict(lora.trainable(model, ["x_embedder", "proj_out"]))
    assert not [name for name, p in trained.items() if "lora_A" not in name and (p.grad is None or not p.grad.any())]


def test_guidance_one_is_plain_flow():
    model, z0, text, draws, null = tiny_flux().eval(), *batch()
    ones = SimpleNamespace(**{**vars(draws), "guidance": torch.ones(len(z0))})
    corrected = guidance_corrected_loss(FLUX, model, z0, text, ones, null)
    assert corrected.item() == pytest.approx(flow_loss(FLUX, model, z0, text, ones, null).item(), rel=1e-6)


def test_pictures_of_guidance_g_are_the_target_of_guidance_g():
    """At g = g_d the corrected loss asks the network for what it sees: no guidance is applied a second time."""
    model, z0, text, draws, null = tiny_flux().eval(), *batch()
    same = SimpleNamespace(**{**vars(draws), "guidance": torch.full((len(z0),), 3.5)})
    corrected = guidance_corrected_loss(FLUX, model, z0, text, same, null, data_guidance=3.5)
    assert corrected.item() == pytest.approx(flow_loss(FLUX, model, z0, text, same, null).item(), rel=1e-5)


def test_epsilon_family_is_trained_on_its_own_prediction():
    """A network that knows eps has no loss; one that answers v has."""
    z0, _, draws, _ = batch()
    labels, null = {"class_labels": torch.arange(6)}, {"class_labels": torch.tensor([1000])}

    def network(answer):
        def forward(z, timestep, class_labels, return_dict):
            assert (class_labels[draws.dropped] == 1000).all()
            return (torch.cat([answer, torch.full_like(answer, 9.0)], 1),)  # second half: learned sigma, ignored

        network = SimpleNamespace(dtype=torch.float32)
        return type("Network", (), {"__call__": staticmethod(forward), "dtype": network.dtype})()

    family = families.get("dit")
    assert flow_loss(family, network(draws.eps), z0, labels, draws, null).item() == pytest.approx(0.0)
    assert flow_loss(family, network(draws.eps - z0), z0, labels, draws, null).item() > 0.5


def test_bell_weighting_is_the_authors_but_for_one_factor():
    """Theirs at 1,000 levels with shift 8, as in DiffSynth; ours has the mean 1 over even levels (10^-6, midpoints)."""
    even = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert bell(even).mean().item() == pytest.approx(1, abs=1e-6)
    assert bell(torch.tensor([0.0, 1.0], dtype=torch.float64)).abs().max() < 1e-15
    times = 1000 * shift_t(torch.linspace(1, 0.003, 1000, dtype=torch.float64), 8.0)
    theirs = (-2 * ((times - 500) / 1000).square()).exp()
    theirs = (theirs - theirs.min()) * 1000 / (theirs - theirs.min()).sum()
    factor = theirs[500] / bell(times / 1000)[500]
    torch.testing.assert_close(bell(times / 1000) * factor, theirs, rtol=0, atol=1e-12)

    model, (z0, text, draws, null) = tiny_flux(), batch()
    found = flow_loss(FLUX, model, z0, text, draws, null, "bell")
    each = [
        flow_loss(FLUX, model, *row(z0, text, draws, i), null).item() * bell(draws.t[i : i + 1]).item()
        for i in range(len(z0))
    ]
    assert found.item() == pytest.approx(sum(each) / len(each), rel=1e-5)


def row(z0, text, draws, number):
    """One sample of a batch."""
    part = slice(number, number + 1)
    return z0[part], {key: value[part] for key, value in text.items()}, Draws(*(v[part] for v in vars(draws).values()))


def test_velocity_weighting_is_the_error_of_ddpm_v():
    """v = sqrt(abar) eps - sqrt(1 - abar) z_0 by the guess of the picture that an epsilon stands for; at most 25
    times that of eps.
    """
    z0, _, draws, _ = batch()
    labels, null, family = (
        {"class_labels": torch.arange(6)},
        {"class_labels": torch.tensor([1000])},
        families.get("dit"),
    )
    answer = draws.eps + 0.1 * z0

    class Network:
        dtype = torch.float32

        def __call__(self, z, timestep, class_labels, return_dict):
            return (torch.cat([answer, answer], 1),)

    for t in (0.2, 0.5, 0.8, 0.95):
        fixed = Draws(draws.eps, torch.full((6,), t), draws.guidance, draws.dropped)
        a, s = (value / (t**2 + (1 - t) ** 2) ** 0.5 for value in (1 - t, t))
        guess = (a * z0 + s * draws.eps - s * answer) / a
        error = (a * answer - s * guess - (a * draws.eps - s * z0)).square().mean()
        plain = flow_loss(family, Network(), z0, labels, fixed, null)
        weighted = flow_loss(family, Network(), z0, labels, fixed, null, "velocity")
        assert weighted.item() == pytest.approx(min(error, 25 * plain).item(), rel=1e-4)
    assert weighted.item() < error.item() / 2  # the bound was reached


def test_draws_do_not_depend_on_the_split():
    whole = draw(1, 5, range(8), SHAPE, SAMPLING)
    parts = [draw(1, 5, part, SHAPE, SAMPLING) for part in (range(0, 3), range(3, 8))]
    for key, value in vars(whole).items():
        assert torch.equal(value, torch.cat([getattr(part, key) for part in parts]))
    others = [draw(1, 6, range(8), SHAPE, SAMPLING), draw(2, 5, range(8), SHAPE, SAMPLING)]
    others.append(draw(1, 5, range(8), SHAPE, SAMPLING, EVALUATION))
    assert not any(torch.equal(other.eps, whole.eps) or torch.equal(other.t, whole.t) for other in others)


def test_distribution_of_the_draws():
    draws = draw(0, 0, range(4000), (1, 2, 2), SAMPLING)
    assert draws.eps.mean().abs() < 0.03 and abs(draws.eps.std() - 1) < 0.03
    assert draws.guidance.min() >= 1.5 and draws.guidance.max() <= 4.0 and abs(draws.guidance.mean() - 2.75) < 0.05
    assert abs(draws.dropped.float().mean() - 0.4) < 0.03
    assert draws.eps.dtype == draws.t.dtype == draws.guidance.dtype == torch.float32


def normals(count):
    return torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_t_is_logit_normal_and_shifted():
    t = t_of_normal(normals(20000), Sampling("logit-normal", 3.0, (1.0, 1.0), 0.0))
    back = t / (3 - 2 * t)  # inverse of t' = 3 t / (1 + 2 t)
    normal = torch.logit(back.double())
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert shift_t(torch.tensor(0.25), 1.0) == 0.25
    assert shift_t(torch.tensor(0.5), 3.0).item() == pytest.approx(0.75)


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize("within", [(0.875, 1.0), (0.0, 0.875), (0.9, 1.0)])
def test_a_network_of_some_noise_levels_draws_the_usual_t_cut_to_them(shift, within):
    """Quantiles against those of the usual draws that lie within, of a million; and against the distribution function
    in float64 by brute force, to 1e-6 (t is float32).
    """
    low, high = within
    normal = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    usual = Sampling("logit-normal", shift, (1.0, 1.0), 0.0)
    every, cut = t_of_normal(normal, usual), t_of_normal(normal, replace(usual, within=within))
    assert low <= cut.min() and cut.max() <= high
    kept = every[(every >= low) & (every < high)].sort().values.double()
    places = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    found = cut.sort().values.double()
    wanted, found = (values[(places * len(values)).long()] for values in (kept, found))
    torch.testing.assert_close(found, wanted, atol=0.012 * (high - low), rtol=0)
    grid = torch.linspace(0, 1, 2_000_001, dtype=torch.float64)[1:-1]  # F of t, point by point
    levels = torch.special.ndtr(torch.logit(grid / (shift - (shift - 1) * grid)))
    start, end = (0.0 if low == 0 else levels[(grid - low).abs().argmin()], 1.0 if high == 1 else
                  levels[(grid - high).abs().argmin()])  # fmt: skip
    for quantile in (0.1, 0.5, 0.9):
        place = torch.searchsorted(levels, start + quantile * (end - start))
        drawn = t_of_normal(
            torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)), replace(usual, within=within)
        )
        assert drawn.item() == pytest.approx(grid[place].item(), abs=1e-6)


def test_ddpm_steps_are_uniform():
    times = torch.linspace(0.01, 0.99, 10)
    t = t_of_normal(normals(20000), Sampling("ddpm", 1.0, (1.0, 1.0), 0.0, times))
    counts = torch.bincount(torch.searchsorted(times, t), minlength=10)
    assert set(t.tolist()) == set(times.tolist()) and (counts - 2000).abs().max() < 150


def test_shift_is_the_samplers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }
    sampling = sampling_of(FLUX, adapt_section(), (32, 32, 32), {"in_channels": 32}, config)
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = 0.5 + 0.65 * (1024 - 256) / 3840
    scheduler.set_timesteps(sigmas=[0.25, 0.5, 0.75], mu=mu)
    assert torch.allclose(shift_t(torch.tensor([0.25, 0.5, 0.75]), sampling.shift), scheduler.sigmas[:3], atol=1e-6)
    assert sampling_of(FLUX, adapt_section(), (8, 4, 4), {"in_channels": 8}, SCHEDULER).shift == 3.0
    published = (((32, 32, 32), 2.828), ((128, 64, 64), 11.31))  # arXiv 2509.25180: 1K f32c32, 4K f64c128
    for shape, shift in published:
        found = sampling_of(FLUX, adapt_section(shift="flux2"), shape, {"in_channels": shape[0]}, {})
        assert found.shift == pytest.approx(shift, rel=1e-3)
    assert sampling_of(FLUX, adapt_section(shift=1.5), (32, 32, 32), {"in_channels": 32}, {}).shift == 1.5


def test_dropped_text_is_the_null_text():
    text = {"a": torch.ones(3, 2, 4), "labels": torch.tensor([1, 2, 3])}
    null = {"a": torch.zeros(1, 2, 4), "labels": torch.tensor([9])}
    mixed = drop_text(text, null, torch.tensor([False, True, False]))
    assert mixed["a"].sum((1, 2)).tolist() == [8, 0, 8] and mixed["labels"].tolist() == [1, 9, 3]


def test_evaluation_repeats_and_does_not_depend_on_batches():
    model, rows = tiny_flux().eval(), Rows()

    def loss_of(z0, text, draws):
        assert not draws.dropped.any()
        return flow_loss(FLUX, model, z0, text, draws, rows.null)

    def batches(size):
        return [(range(i, i + size), *rows.batch(range(i, i + size))) for i in range(0, 8, size)]

    first = evaluate_loss(loss_of, batches(8), 0, lambda shape: SAMPLING)
    torch.randn(5)  # the global generator has no part in it
    assert evaluate_loss(loss_of, batches(8), 0, lambda shape: SAMPLING) == first
    assert evaluate_loss(loss_of, batches(2), 0, lambda shape: SAMPLING) == pytest.approx(first, rel=1e-5)
    assert len(first) == 6 and list(first)[2] == f"t{shift_t(torch.tensor(0.5), 2.0):.2f}"


@pytest.mark.parametrize("name", ["flux", "zimage"])
def test_consistency_loss_is_the_written_one(name):
    """Value and gradient, sample by sample; teacher and target have no gradient. Z-Image's network answers -v."""
    sign = -1.0 if name == "zimage" else 1.0
    family = type("Signed", (type(FLUX),), {"prediction": families.get(name).prediction})()
    model, (z0, text, draws, null) = tiny_flux().eval(), batch()
    teacher = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        teacher.proj_out.weight.add_(0.05)

    def v(network, z, t, i):
        condition = null if draws.dropped[i] else {key: value[i : i + 1] for key, value in text.items()}
        return sign * FLUX.predict(network, z[None], t[None], condition, draws.guidance[i : i + 1])[0]

    errors, far = [], 0.0
    for i, t in enumerate(draws.t):
        z, r = (1 - t) * z0[i] + t * draws.eps[i], 0.75 * t
        with torch.no_grad():
            nearer = z + (r - t) * v(teacher, z, t, i)
            goal = nearer - r * v(model, nearer, r, i)
        errors.append((z - t * v(model, z, t, i) - goal).square().mean() / t**2)
        far = max(far, (goal - z0[i]).abs().max().item())
    assert far > 0.5  # the target is not the picture

    def answer(z, t, condition, g):
        return velocity(family, teacher, z, t, condition, g)

    loss = consistency_loss(family, model, z0, text, draws, null, answer, 0.75)
    reference = torch.stack(errors).mean()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    ours, theirs = gradients(loss, model), gradients(reference, model)
    assert ours.keys() == theirs.keys() and all(
        torch.allclose(ours[key], theirs[key], atol=1e-6, rtol=1e-4) for key in theirs
    )
