"""Fixtures of the tests that every family goes through: its tiny source, what the stock pipeline does with it, and its
conversion.
"""

from types import SimpleNamespace

import pytest
import torch
from bundle.conftest import Parts, autoencoder_dc, make_bundle

from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.console import NULL
from dcgen_convert.core.journal import Stage
from dcgen_convert.families import Family
from dcgen_convert.networks import models, pipelines
from dcgen_convert.stages import surgery
from dcgen_convert.stages.job import Autoencoder

from .tiny_models import TINY
from .tiny_parts import keep_states, network_of, reference_pixels, small_references
from .tiny_videos import VIDEOS, video_vae

GUIDANCE, SEED, STEPS = 2.5, 3, 2
DEEP = [(32, 32), (64, 128), (128, 512), (32, 128)]  # the last is DC-AE 1.5 at f32


@pytest.fixture(scope="session", autouse=True)
def _small_references():
    with pytest.MonkeyPatch.context() as patch:
        small_references(patch)
        yield


def pytest_generate_tests(metafunc):
    """Every family in turn. There are no bundles of videos yet."""
    if {"tiny", "source"} <= {*metafunc.fixturenames}:
        names = TINY if "bundle" in metafunc.fixturenames else {**TINY, **VIDEOS}
        metafunc.parametrize("tiny", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def tiny(request):
    return request.param, {**TINY, **VIDEOS}[request.param]


def deep_autoencoder(family: Family, factor: int, channels: int):
    return autoencoder_dc(factor, channels) if family.axes == 2 else video_vae(factor, channels)


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """The family's tiny source, resolved from its folder as `convert` does."""
    name, entry = tiny
    folder = tmp_path_factory.mktemp(name) / "source"
    entry.build(folder)
    return load_source(name, str(folder))


@pytest.fixture(scope="module")
def stock(tiny, source):
    """(pipeline, what scheduler.step receives at every step, what the embedder makes of it, (last state, picture)) of a
    stock drawing."""
    _, entry = tiny
    family, pipeline = source.family, pipelines.load_pipeline(source, torch.float32)
    steps, embedded, states = [], [], []
    keep_states(pipeline, states, steps)
    embedder = network_of(pipeline).get_submodule(family.embedder)
    hook = embedder.register_forward_hook(lambda module, args, output: embedded.append(output))
    settings = dict(side=entry.side, steps=STEPS, guidance=GUIDANCE, length=entry.length, frames=entry.frames)
    given = reference_pixels(entry.references)
    picture = pipelines.draw(family, pipeline, [entry.prompt], [SEED], **settings, references=[given] if given else ())
    hook.remove()
    assert len(steps) == STEPS
    if entry.packed_noise:  # a sampler's state of tokens may be a map of them
        steps = [(as_tokens(output), timestep, as_tokens(sample)) for output, timestep, sample in steps]
        states = [as_tokens(state) for state in states]
    return pipeline, steps, embedded, (states[-1], picture)


def as_tokens(state: torch.Tensor) -> torch.Tensor:
    """(B, K, rows, columns) -> (B, N, K); tokens stay as they are."""
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state


@pytest.fixture(scope="module", params=DEEP, ids=lambda deep: f"f{deep[0]}c{deep[1]}")
def converted(request, tiny, source, tmp_path_factory):
    """(Parts of the bundle, converted model) after surgery, embedder and head random: they are aligned elsewhere."""
    factor, channels = request.param
    folder = tmp_path_factory.mktemp(f"{tiny[0]}-f{factor}")
    deep_autoencoder(source.family, factor, channels).save_pretrained(folder / "ae")
    ae = Autoencoder("tiny", folder / "ae", None, factor, channels)
    side = tiny[1].deep_side or 2 * factor
    config = source.family.convert_config(source.config, factor, channels, side)
    job = SimpleNamespace(
        source=source, family=source.family, ae=ae, resolution=side, converted_config=config, console=NULL,
        keeps_latents=False,
    )  # fmt: skip
    surgery.run(job, Stage(folder))
    model = models.load(folder / models.TRANSFORMER, torch.float32)
    generator = torch.Generator().manual_seed(5)
    for name in (source.family.embedder, source.family.head):
        for value in model.get_submodule(name).parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder / models.TRANSFORMER)
    parts = Parts(source.family, source.root, folder / models.TRANSFORMER, folder / "ae", channels, factor, side)
    return parts, model


@pytest.fixture(scope="module")
def bundle(tiny, converted, tmp_path_factory):
    """The bundle's folder, written as a conversion writes it."""
    return make_bundle(converted[0], tmp_path_factory.mktemp("bundle") / tiny[0], length=tiny[1].length)
