"""Every family's work on a pretend device: it gives the numbers of the CPU, and any mixing of devices fails.

A commit tries the kinds of work of `OFTEN` on every family, most kinds on the families of `WHOLE`, and 4 bits once.
With `--every` all kinds are tried on all families.
"""

from collections import Counter
from functools import cache

import pretend_device
import pytest
import torch
from pretend_device import IN, OUT, SIZE

from dcgen_convert.networks import pipelines
from dcgen_convert.stages import gap
from dcgen_convert.svdquant import layer, smooth
from dcgen_convert.train.objective import QUANTILES

from .device_work import FOUR_BITS, REPEATED, WORK, bench
from .tiny_models import TINY
from .tiny_videos import VIDEOS

EVERY = {**TINY, **VIDEOS}
OFTEN = ("head", "lora")
WHOLE = ("flux", "dit", "sana")
TOLERANCE = {
    "consistency": 5e-3,
    "grid": 5e-3,
    "lora": 2e-3,
    "lora start": 2e-3,
}  # of the largest number; 5e-3 is one step of 8 bits


def pytest_generate_tests(metafunc):
    """Tests of a ``kind`` of work: which kinds on which families."""
    every, name = metafunc.config.getoption("--every"), metafunc.function.__name__
    if name.startswith("test_work"):
        wanted = [(family, kind) for family in EVERY for kind in WORK if every or often(family, kind)]
        pairs = [(family, kind) for family, kind in wanted if EVERY[family].wide or kind not in FOUR_BITS]
    elif name.startswith("test_the_host"):  # HiDream reads how many tokens each of its experts has
        pairs = [(family, kind) for family in EVERY for kind in REPEATED if family != "hidream"]
    else:
        pairs = [("flux", "gap")]
    metafunc.parametrize(("tiny", "kind"), pairs, indirect=["tiny"])


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    """The bench of a family by its name, made once."""
    return cache(lambda name: bench(name, tmp_path_factory.mktemp(name)))


@pytest.fixture
def tiny(request, benches):
    return benches(request.param)


@pytest.fixture
def on(monkeypatch):
    """on(device): from now on everything runs there."""
    return lambda device: monkeypatch.setattr(pipelines, "device", lambda: device)


def often(name, kind):
    """Whether a commit tries it."""
    if (name, kind) == ("wan-a14b", "draw"):  # two networks, of which one is there at a time
        return True
    return (name, kind) == ("dit", "nvfp4") if kind in FOUR_BITS else name in WHOLE or kind in OFTEN


def test_work_gives_the_same_on_a_device(kind, tiny, on, monkeypatch):
    monkeypatch.setattr(layer, "REFITS", 0)  # smoothing and refits have tests of their own
    monkeypatch.setattr(smooth, "COARSE", ())
    monkeypatch.setattr(smooth, "MIXED", ())
    on("cpu")
    here = [] if kind in FOUR_BITS else WORK[kind](tiny, "cpu")
    with pretend_device.ready() as device:
        on(device)
        there = WORK[kind](tiny, device)
    if kind in FOUR_BITS:  # elsewhere it is calibrated in bfloat16, so nothing is the same to the bit
        dense, *quantised = there
        for found in quantised:
            assert torch.isfinite(found).all() and 1e-4 < (found - dense).norm() / dense.norm() < 0.4
        return
    for mine, goal in zip(there, here, strict=True):
        assert (mine.device.type, mine.shape, mine.dtype) == ("cpu", goal.shape, goal.dtype)
    there, here = ([found.float() for found in every] for every in (there, here))  # of masks too
    largest = max(goal.abs().max().item() for goal in here)
    for mine, goal in zip(there, here, strict=True):
        scale = max(goal.abs().max().item(), 1e-3 * largest)  # what ought to be zero is rounding
        torch.testing.assert_close(mine / scale, goal / scale, atol=TOLERANCE.get(kind, 2e-5), rtol=0)


# How often the host waits in one forward pass: in code of diffusers, or because captions differ in length.
A_PASS = {
    "lumina2": {IN: 3, OUT: 1},
    "zimage": {OUT: 1},
    "chroma": {IN: 1},
    "cogview4": {IN: 8, OUT: 1},
    "qwenimage": {IN: 1},
    "qwenimage-edit": {IN: 1},
    "qwenimage-edit-plus": {IN: 2},  # and which token is a reference's
    "hunyuanimage": {SIZE: 16},
}
MORE = {
    ("lumina2", "head batch"): {OUT: 1},  # where the image begins behind its caption
    ("cogview4", "micro-step"): {IN: 8},  # captions of two lengths, one after the other
}


def waits(tiny, kind):
    """What is written down: copies of the batch where no thread has pinned it, results that leave the device."""
    corrected, guided = (tiny.family.guidance == name for name in ("embedded", "cfg"))
    conditions = 2 if tiny.family.picture_tokens else 1  # a row's own null condition
    # latents, condition, four kinds of draws
    arriving = 5 + conditions * len(tiny.family.text_keys) + len(tiny.entry.references)
    batch, passes = {
        "micro-step": ({}, 1 + corrected),
        "drawing step": ({}, 1 + guided),
        "head batch": ({IN: arriving}, 1 + corrected),
        "held-out batch": ({IN: len(QUANTILES) * arriving, OUT: 1}, len(QUANTILES) * (1 + corrected)),
        "encoded batch": ({IN: 1, OUT: 1}, 0),
    }[kind]
    found = Counter(batch) + Counter(MORE.get((tiny.name, kind), {}))
    return found + Counter({name: passes * count for name, count in A_PASS.get(tiny.name, {}).items()})


def test_the_host_waits_as_seldom_as_is_written_down(kind, tiny, on):
    """Micro-steps and drawing steps of most families: never. What stays on the device is there already."""
    with pretend_device.ready() as device:
        on(device)
        once = REPEATED[kind](tiny, device)
        once()
        with pretend_device.counting() as counts:
            once()
    assert +counts == waits(tiny, kind)


def test_latents_that_stay_on_the_cpu_are_noticed(kind, tiny, on, monkeypatch, tmp_path):
    """As stage `gap` once left them."""
    monkeypatch.setattr(gap.objective, "to_device", lambda batch, device: batch)
    with pretend_device.ready() as device:
        on(device)
        with pytest.raises(RuntimeError, match="two devices"):
            gap.measure(tiny.job, tiny.converted, tiny.rows, tmp_path)
