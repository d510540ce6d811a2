"""A budget of GPU-hours: what follows from it costs no more, and nearly as much; what the user names stays."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from dcgen_convert.api.order import order, resolve
from dcgen_convert.core.errors import DcgenError
from dcgen_convert.core.names import RECIPE
from dcgen_convert.core.version import __version__
from dcgen_convert.planning import budget, plan, present
from dcgen_convert.planning.bill import Measured, bill
from dcgen_convert.planning.rates import H100
from dcgen_convert.planning.shapes import shapes_of
from dcgen_convert.recipe import loading, shelf
from dcgen_convert.recipe.schema import Budget

DEFAULTS = [  # source, autoencoder, GPU-hours: 15, 8, 1 and half an H100-day
    ("flux-krea", "dc-ae-f32", 360),
    ("flux-krea", "dc-ae-f64", 192),
    ("sana-1.6b", None, 24),
    ("dit-xl-512", None, 12),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def cost(resolved, gpus=1, measured=None) -> float:
    return bill(resolved.recipe, shapes_of(resolved.recipe, resolved.identity), gpus, measured)["gpu_hours"]


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize(("source", "ae", "hours"), DEFAULTS)
def test_the_shipped_budgets_pay_for_every_stage(source, ae, hours, gpus):
    """Pictures are cut where the recipe as written costs more. DiT's costs 11.8 hours on one GPU and 12.6 on eight."""
    written = resolve(source, {"ae": ae, "gpus": gpus, "quantize": "nvfp4", "max_gpu_hours": 0})
    whole = cost(written, gpus)
    resolved = resolve(source, {"ae": ae, "gpus": gpus, "quantize": "nvfp4"})
    assert 0.9 * hours <= cost(resolved, gpus) <= hours
    assert resolved.recipe.budget.gpu_hours == hours
    cut = f"derived: budget of {hours} GPU-hours"
    assert resolved.origins["data.count"] == (cut if whole > hours else written.origins["data.count"])
    assert (whole > hours) == (source != "dit-xl-512" or gpus == 8)
    assert resolved.derivation[0].startswith(f"The budget is {hours} GPU-hours: ")


@pytest.mark.parametrize("name", ["flux-krea", "sana-sprint-1.6b", "image", "tiny-flux-long", "few-steps"])
def test_no_budget_is_exceeded_and_nothing_is_left_over(name):
    """Random budgets between the smallest and the recipe as written, on 1 to 64 GPUs."""
    rng = random.Random(name)
    written = resolve(name, {"max_gpu_hours": 0})
    sizes = shapes_of(written.recipe, written.identity)
    for _ in range(4):
        gpus = rng.choice([1, 2] if "tiny" in name else [1, 2, 8, 64])
        whole = bill(written.recipe, sizes, gpus)["gpu_hours"]
        hours = whole * rng.uniform(0.3, 1.1)
        changed, lines = budget.derive(written.recipe, sizes, gpus, hours)
        spent = bill(changed, sizes, gpus)["gpu_hours"]
        assert spent <= hours, (gpus, hours)
        if changed == written.recipe:
            assert whole <= hours
            continue
        phases = zip(changed.adapt.phases, written.recipe.adapt.phases, strict=True)
        capped = changed.data.count == written.recipe.data.count and all(a.steps == b.steps for a, b in phases)
        assert capped or spent >= 0.9 * hours, (gpus, hours)
        assert lines[-1] == f"In all: {spent:,.4g} of {hours:,.4g} GPU-hours."


def test_the_shares_decide_what_each_part_gets():
    shares = {"data.share": 0.5, "adapt.phases.0.share": 0.1, "adapt.phases.1.share": 0.4}
    sets = [f"{key}={value}" for key, value in shares.items()]
    resolved = resolve("flux-krea", {"max_gpu_hours": 100, "sets": sets})
    stages = bill(resolved.recipe, shapes_of(resolved.recipe, resolved.identity), 1)["stages"]
    found = {row["stage"]: row["gpu_hours"] for row in stages}
    assert found["data"] + found["latents"] == pytest.approx(50, rel=0.05)
    assert found["adapt-1"] == pytest.approx(10, rel=0.05)
    assert found["adapt-2"] == pytest.approx(40, rel=0.05)
    with pytest.raises(DcgenError, match=r"add up to 1\.3, more than the whole"):
        resolve("flux-krea", {"sets": [*sets, "data.share=0.8"]})


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_budget_that_is_too_small_names_the_smallest(gpus):
    with pytest.raises(DcgenError, match="the smallest is") as caught:
        resolve("flux-krea", {"max_gpu_hours": 0.5, "gpus": gpus})
    assert caught.value.exit_code == 2
    smallest = float(caught.value.message.rpartition(" ")[2])
    assert f"--max-gpu-hours {smallest:g} or more" in caught.value.hint
    assert cost(resolve("flux-krea", {"max_gpu_hours": smallest, "gpus": gpus}), gpus) <= smallest
    with pytest.raises(DcgenError, match="the smallest is"):
        resolve("flux-krea", {"max_gpu_hours": 0.98 * smallest, "gpus": gpus})
    with pytest.raises(DcgenError, match="the smallest is") as caught:
        resolve("flux-krea", {"hours": 0.1, "gpus": gpus})
    hours = float(caught.value.hint.partition("--hours ")[2].partition(" ")[0])
    assert resolve("flux-krea", {"hours": hours, "gpus": gpus}).derivation


def test_what_the_user_names_stays_and_the_rest_follows(monkeypatch):
    monkeypatch.setenv("DCGEN_CONVERT_DATA__COUNT", "5000")
    sets = ["adapt.phases.0.steps=3000", "align_head.steps=200", "adapt.phases.1.warmup=7"]
    resolved = resolve("flux-krea", {"max_gpu_hours": 200, "sets": sets})
    recipe, lines = resolved.recipe, "\n".join(resolved.derivation)
    assert (recipe.data.count, recipe.adapt.phases[0].steps, recipe.align_head.steps) == (5000, 3000, 200)
    assert recipe.adapt.phases[1].warmup == 7
    assert 180 <= cost(resolved) <= 200
    assert "data.count stays 5,000: it was asked for." in lines
    assert "adapt.phases.0.steps stays 3,000: it was asked for." in lines
    assert resolved.origins["adapt.phases.0.steps"] == "--set"
    assert resolved.origins["adapt.phases.1.steps"] == "derived: budget of 200 GPU-hours"


def test_wall_clock_is_the_same_budget_on_the_gpus_of_the_job():
    by_hours = resolve("flux-krea", {"hours": 24, "gpus": 8})
    by_gpu_hours = resolve("flux-krea", {"max_gpu_hours": 192, "gpus": 8})
    assert by_hours.recipe.adapt == by_gpu_hours.recipe.adapt
    assert by_hours.recipe.data == by_gpu_hours.recipe.data
    assert "24 h 00 min on 8 x H100" in by_hours.derivation[0]
    longer = resolve("flux-krea", {"hours": 60, "gpus": 8})  # more than the recipe's own budget
    assert 360 < cost(longer, 8) <= 480
    both = resolve("flux-krea", {"hours": 24, "max_gpu_hours": 100, "gpus": 8})
    assert cost(both, 8) <= 100


def test_zero_carries_the_published_recipe_out():
    published = resolve("flux-krea", {"max_gpu_hours": 0})
    written = loading.load("flux-krea").recipe
    assert published.recipe.model_copy(update={"budget": written.budget}) == written
    assert [phase.steps for phase in published.recipe.adapt.phases] == [10_000, 100_000]
    assert published.derivation == ()


def test_the_pictures_of_a_phase_are_a_part_of_their_own():
    flags = {"ae": "dc-ae-f64", "resolution": 4096, "data": "pictures", "gpus": 8, "max_gpu_hours": 120}
    found = resolve("flux-krea", flags)
    first, second = found.recipe.adapt.phases
    assert 256 < second.data.count < 20_000 and 256 < found.recipe.data.count < 50_000
    assert 1_000 < first.steps < 4_000 and 1_000 < second.steps < 3_000
    assert bill(found.recipe, shapes_of(found.recipe, found.identity), 8)["gpu_hours"] <= 120
    assert found.origins["adapt.phases.1.data.count"] == "derived: budget of 120 GPU-hours"
    assert any("of your pictures for 4096 px" in line for line in found.derivation)
    said = resolve("flux-krea", {**flags, "sets": ["adapt.phases.1.data.count=9000"]})
    assert said.recipe.adapt.phases[1].data.count == 9_000


def test_a_size_that_no_budget_was_made_for_has_none():
    large = resolve("flux-krea", {"resolution": 1536, "data": "pictures"})
    assert "no budget for a model with 2,304 image tokens" in large.derivation[0]
    assert large.recipe.adapt.phases[-1].steps == 100_000


@pytest.mark.parametrize(
    "value", ["-3", ".nan", "abc", "[1]", "null", "{}", "{256: -1}", "{a: 1}", "{0: 5}", "true", "{256: true}"]
)
def test_what_is_no_budget_is_one_sentence(value):
    with pytest.raises(DcgenError, match=r"^budget.gpu_hours must be GPU-hours from 0 to 1,000,000,000, or a table"):
        resolve("flux-krea", {"sets": [f"budget.gpu_hours={value}"]})


@pytest.mark.parametrize("name", [name for name in shelf.names() if "tiny" in name or "/" in name])
def test_the_miniatures_have_no_budget(name):
    resolved = resolve(name, {})
    assert resolved.recipe == loading.load(name).recipe
    assert resolved.derivation == ()


def test_measured_seconds_decide_instead_of_assumed_rates():
    resolved = resolve("flux-krea", {"max_gpu_hours": 0})
    recipe, sizes = resolved.recipe, shapes_of(resolved.recipe, resolved.identity)
    rows = bill(recipe, sizes, 1)["stages"]
    part = next(part for row in rows if row["stage"] == "adapt-2" for part in row["work"] if part["what"] == "train")
    seconds = 3600 * part["wall_hours"] / part["count"]
    slow = SimpleNamespace(stages={"adapt-2": Measured({"train": 3 * seconds}, 0.0)}, machine=H100)
    changed, _ = budget.derive(recipe, sizes, 1, 360, (), slow)
    usual, _ = budget.derive(recipe, sizes, 1, 360)
    assert 324 <= bill(changed, sizes, 1, slow)["gpu_hours"] <= 360
    asked = replace(resolved, recipe=recipe.model_copy(update={"budget": Budget(gpu_hours=360.0)}), origins={})
    assert budget.applied(asked, lambda: sizes, 1, slow).recipe.adapt == changed.adapt
    assert changed.adapt.phases[1].steps == pytest.approx(usual.adapt.phases[1].steps / 3, rel=0.05)


def test_plan_shows_the_derivation():
    resolved = resolve("flux-krea", {"gpus": 8})
    document = plan.plan(resolved)
    assert document["budget"] == {"gpu_hours": 360.0, "hours": 0.0, "derivation": list(resolved.derivation)}
    text = plan.render(document)
    assert all(line in text for line in resolved.derivation)
    assert document["time"]["gpu_hours"] <= 360
    json.dumps(document)


def test_a_run_keeps_its_numbers_when_the_same_command_comes_again(tmp_path):
    """Another rate, or another number of GPUs, must not throw away what is done."""
    settings = {"max_gpu_hours": 0.05, "sets": ["budget.hours=0"]}
    first = order("tiny-flux", settings, None, tmp_path).resolved
    assert first.recipe.data.count < 1024
    record = {"recipe": first.recipe.model_dump(mode="json"), "machine": {}, "output": "x", "version": __version__}
    record["recipe"]["data"]["count"] -= 100
    (tmp_path / RECIPE).write_text(json.dumps(record))
    again = order("tiny-flux", {**settings, "gpus": 2}, None, tmp_path).resolved
    assert again.recipe.data.count == first.recipe.data.count - 100
    assert again.derivation == ("The run has its numbers already, from the same budget of 0.05 GPU-hours. They stay.",)
    other = order("tiny-flux", {**settings, "max_gpu_hours": 0.1}, None, tmp_path).resolved
    assert other.recipe.data.count > again.recipe.data.count
    deeper = order("tiny-flux", {**settings, "ae": "tiny-dc-ae-f64"}, None, tmp_path).resolved
    assert deeper.derivation != again.derivation


@pytest.mark.parametrize("said", [[], ["data.count=5000"]])
def test_pictures_that_a_folder_does_not_hold_take_no_part_of_the_budget(tmp_path, said):
    """Their hours go to the steps; a number that the user named stays."""
    for number in range(3):
        Image.new("RGB", (1024, 1024)).save(tmp_path / f"{number}.png")
    asked = {"ae": "dc-ae-f64", "data": str(tmp_path), "sets": said}
    whole = cost(resolve("flux-krea", {**asked, "max_gpu_hours": 0}))
    resolved = resolve("flux-krea", {**asked, "max_gpu_hours": 80})
    assert (
        whole > 90 and 70 < cost(replace(resolved, recipe=present.counted(resolved.recipe, resolved.identity)[0])) <= 80
    )
    assert resolved.recipe.data.count == (5000 if said else 3)
    assert "3 pictures can be used" in resolved.derivation[0]
