"""The memory arithmetic stays near the table that its terms come from, and decides what its own numbers say."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcgen_convert.planning import memory as plan
from dcgen_convert.planning.fit import decide, micro_batch
from dcgen_convert.recipe.loading import load

# FLUX 12B for f64c128 at 4096 + 512 tokens, LoRA r256: frozen, trained parameters of the table below
FROZEN, TRAINED = 11_901_011_968, 1_046_744_192
SAMPLE = plan.activations(4608, 3072, 57)
LORA = plan.Training(FROZEN, TRAINED, SAMPLE)
# stage, offload, GPUs, weights, grads, optimizer, activations, other, total, host [GiB], max micro-batch H100 / H200.
# It adds the update's transient (in optimizer, 4 B) to the activations, and has no term for the flat copies of the
# gradients: the census (test_census.py) says otherwise.
TABLE = """
0 none 1 24.1 1.9 15.6 2.30 5.0 49.0 0.0 13 37
1 none 1 24.1 1.9 15.6 2.30 5.0 49.0 0.0 13 37
1 none 2 24.1 1.9 7.8 2.30 4.4 40.6 0.0 16 40
1 none 4 24.1 1.9 3.9 2.30 4.1 36.3 0.0 18 42
1 none 8 24.1 1.9 1.9 2.30 3.9 34.2 0.0 19 43
1 none 16 24.1 1.9 1.0 2.30 3.8 33.2 0.0 19 43
2 none 1 24.1 2.7 15.6 2.30 5.1 49.8 0.0 12 37
2 none 2 24.1 1.7 7.8 2.30 4.4 40.3 0.0 16 41
2 none 4 24.1 1.2 3.9 2.30 4.0 35.6 0.0 18 42
2 none 8 24.1 1.0 1.9 2.30 3.8 33.2 0.0 19 43
2 none 16 24.1 0.9 1.0 2.30 3.8 32.0 0.0 19 44
3 none 1 24.1 2.7 15.6 2.30 5.1 49.8 0.0 12 37
3 none 2 13.9 1.7 7.8 2.30 3.6 29.3 0.0 21 45
3 none 4 7.9 1.2 3.9 2.30 2.7 18.1 0.0 25 49
3 none 8 4.9 1.0 1.9 2.30 2.3 12.4 0.0 27 52
3 none 16 3.4 0.9 1.0 2.30 2.1 9.6 0.0 28 53
2 optimizer 1 24.1 2.7 0.0 2.30 3.8 32.9 15.6 19 43
2 optimizer 2 24.1 1.7 0.0 2.30 3.8 31.9 15.6 19 44
2 optimizer 4 24.1 1.2 0.0 2.30 3.7 31.4 15.6 20 44
2 optimizer 8 24.1 1.0 0.0 2.30 3.7 31.1 15.6 20 44
2 optimizer 16 24.1 0.9 0.0 2.30 3.7 31.0 15.6 20 44
3 all 1 1.9 2.7 0.0 2.30 2.0 8.9 39.7 29 53
3 all 2 1.9 1.7 0.0 2.30 2.0 7.9 39.7 29 54
3 all 4 1.9 1.2 0.0 2.30 1.9 7.3 39.7 29 54
3 all 8 1.9 1.0 0.0 2.30 1.9 7.1 39.7 29 54
3 all 16 1.9 0.9 0.0 2.30 1.9 6.9 39.7 30 54
""".strip().splitlines()
# full fine-tune, 11.9 B trained: GPUs, weights, grads, optimizer, activations, other, total
FULL = [
    "4 7.4 6.3 44.3 2.30 6.3 66.7",
    "8 4.6 3.5 22.2 2.30 4.1 36.7",
    "16 3.2 2.1 11.1 2.30 3.0 21.8",
    "32 2.6 1.4 5.5 2.30 2.4 14.3",
]


@pytest.mark.parametrize("line", TABLE)
def test_table(line):
    zero, offload, gpus, *sizes, h100, h200 = line.split()
    found = plan.estimate(LORA, int(gpus), int(zero), offload, 1)
    weights, _, _, activations, _, total, host = (float(size) for size in sizes)
    parts = [found.weights, found.activations, found.host]
    assert [part / plan.GIB for part in parts] == pytest.approx([weights, activations, host], abs=0.051)
    assert found.total / plan.GIB == pytest.approx(total, rel=0.065, abs=0.42)
    for card, most in (("H100-80", h100), ("H200-141", h200)):
        room = plan.GPUS[card] * plan.GIB
        assert plan.max_micro_batch(LORA, int(gpus), int(zero), offload, room) == pytest.approx(int(most), abs=2)


@pytest.mark.parametrize("line", FULL)
def test_full_fine_tune(line):
    gpus, *sizes = line.split()
    found = plan.estimate(plan.Training(0, 11_901_801_600, SAMPLE), int(gpus), 3, "none", 1)
    weights, *_, total = (float(size) for size in sizes)
    assert found.weights / plan.GIB == pytest.approx(weights, abs=0.051)
    assert found.total / plan.GIB == pytest.approx(total, rel=0.11)


def test_activations_are_those_measured():
    sample = plan.activations(4608, 3072, 57)
    assert sample / plan.GIB == pytest.approx(2.31, abs=0.02)
    assert plan.activations(1536, 3072, 57) / plan.GIB == pytest.approx(0.77, abs=0.01)
    assert plan.activations(4608, 3072, 57, checkpointing=False) / plan.GIB == pytest.approx(30.1, rel=0.02)


@given(
    st.floats(1e6, 1e11),
    st.floats(1e6, 1e10),
    st.integers(1, 64),
    st.sampled_from(plan.MODES),
    st.floats(1e6, 1e10),
    st.floats(1e9, 2e11),
)
def test_the_largest_micro_batch_fits_and_one_more_does_not(frozen, trained, gpus, mode, sample, room):
    zero, offload = mode
    what = plan.Training(frozen, trained, sample)
    most = plan.max_micro_batch(what, gpus, zero, offload, room)
    if most:
        assert plan.estimate(what, gpus, zero, offload, most).total <= room * (1 + 1e-9)
    assert plan.estimate(what, gpus, zero, offload, most + 1).total > room * (1 - 1e-9)


def test_the_lightest_machinery_that_fits_is_chosen_and_says_why():
    room = 79.1 * plan.GIB
    choice = plan.choose(LORA, 1, 1, room)
    assert (choice.zero, choice.offload) == (1, "none")
    assert "48.6 of 79.1 GiB" in choice.reason
    assert plan.choose(LORA, 4, 1, 20 * plan.GIB).zero == 3
    assert plan.choose(LORA, 1, 1, 24 * plan.GIB) == plan.Choice(
        3, "all", "ZeRO-3, all offload: 9.3 of 24.0 GiB on each of 1 GPU(s) at micro-batch 1"
    )
    assert plan.choose(LORA, 1, 1, 4 * plan.GIB).zero is None


def test_the_smallest_change_is_named():
    assert plan.smallest_change(LORA, 1, 40 * plan.GIB) == "--zero 2 --offload optimizer with micro_batch 1"
    # a full fine-tune, whose gradients alone exceed the card: only more GPUs help
    assert (
        plan.smallest_change(plan.Training(0, 11.9e9, SAMPLE), 1, 20 * plan.GIB)
        == "--zero 3 --offload all --gpus 2 with micro_batch 1"
    )
    assert "do not suffice" in plan.smallest_change(LORA, 1, 2 * plan.GIB)


@pytest.mark.parametrize(
    "part, limit, size", [(256, 39, 32), (256, 300, 256), (64, 64, 64), (12, 5, 4), (7, 6, 1), (8, 0, 1)]
)
def test_micro_batches_divide_the_part_of_a_gpu(part, limit, size):
    assert micro_batch(part, limit) == size


def test_fit_obeys_the_user_and_decides_auto():
    from dcgen_convert.planning.arithmetic import Trainable
    from dcgen_convert.planning.layers import Structure

    sizes = SimpleNamespace(
        converted=Structure((), 0, 57, 3072, 4096),
        trainable=lambda _: Trainable(TRAINED, FROZEN, 418),
        tokens=lambda _: 4608,
        encoders_beside=lambda _: 0.0,
    )
    room = 79.1 * plan.GIB

    def found(**settings):
        recipe = load("flux-krea", sets=[f"adapt.{key}={value}" for key, value in settings.items()]).recipe
        return decide(recipe, recipe.adapt.phases[-1], sizes, 1, room)

    auto = found(zero="auto")
    assert (auto.zero, auto.offload, auto.micro_batch, auto.problem) == (1, "none", 8, None)
    without = found(zero="auto", ema=0)
    assert auto.memory.optimizer - without.memory.optimizer == 4 * TRAINED  # the moving average
    asked = found(zero=2, offload="optimizer")
    assert (asked.zero, asked.offload, asked.reason, asked.micro_batch) == (2, "optimizer", "ZeRO-2 as set", 16)
    greedy = found(**{"phases.1.micro_batch": 64})
    assert greedy.micro_batch == 64
    assert greedy.problem == (
        "training at 1024 px does not fit 79.1 GiB per GPU at micro-batch 64",
        "use --set adapt.phases.*.micro_batch=8",
    )
    # the smallest change is one that fits
    assert found(zero="auto", **{"phases.1.micro_batch": 8}).problem is None
