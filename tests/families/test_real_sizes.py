"""Models of the published sizes on a device without memory: shapes, types and devices of what a conversion computes.

The pretend device refuses tensors of the CPU. Here its tensors have no values either: a pass that reads one fails. With
`--every` all models are tried.
"""

import re
import resource
from dataclasses import dataclass
from types import SimpleNamespace

import pretend_device
import pytest
import torch
from torch import nn

from dcgen_convert import families
from dcgen_convert.core.console import NULL
from dcgen_convert.core.files import read_json
from dcgen_convert.families import catalog, ddpm
from dcgen_convert.families.base import NULL as EMPTY
from dcgen_convert.families.base import REFERENCE
from dcgen_convert.networks import pipelines
from dcgen_convert.recipe.schema import Adapt
from dcgen_convert.stages import grid
from dcgen_convert.stages.head_fit import HeadFit
from dcgen_convert.svdquant.skeleton import build, without_memory
from dcgen_convert.train import lora, objective, phases
from dcgen_convert.train.ridge import NormalEquations

RANK, BATCH = 64, 2
STEP = "test_loss_and_gradients_of_a_lora_step"
OTHERS = ("test_features_of_the_head", "test_a_step_of_the_grids_sampler")
OFTEN = {"flux-dev": [STEP], "sana-1.6b": [STEP, *OTHERS], "dit-xl-256": OTHERS}  # what a commit tries: 40 CPU seconds


@dataclass(frozen=True)
class Size:
    """A published model, what it becomes, and the condition of one picture: shape and type by keyword.

    Attributes:
        billions: parameters after the conversion.
        factor, channels, side: of the autoencoder, and of the pictures in px.
    """

    family: str
    billions: float
    text: dict[str, tuple[tuple[int, ...], torch.dtype]]
    factor: int = 64
    channels: int = 128
    side: int = 1024


SIZES = {
    "flux-dev": Size(
        "flux",
        11.9,
        {"encoder_hidden_states": ((256, 4096), torch.bfloat16), "pooled_projections": ((768,), torch.bfloat16)},
    ),
    "sana-1.6b": Size(
        "sana",
        1.6,
        {"encoder_hidden_states": ((300, 2304), torch.bfloat16), "encoder_attention_mask": ((300,), torch.int64)},
    ),
    "dit-xl-256": Size("dit", 0.75, {"class_labels": ((), torch.int64)}, factor=32, channels=32, side=256),
    "qwenimage-edit-2511": Size(
        "qwenimage-edit-plus",
        20.4,
        {
            f"{start}{name}": kind
            for start in ("", EMPTY)
            for name, kind in (
                ("encoder_hidden_states", ((928, 3584), torch.bfloat16)),
                ("encoder_hidden_states_mask", ((928,), torch.int64)),
            )
        }
        | {REFERENCE: ((128, 8, 24), torch.bfloat16)},
    ),
    "qwenimage": Size(
        "qwenimage",
        20.4,
        {"encoder_hidden_states": ((256, 3584), torch.bfloat16), "encoder_hidden_states_mask": ((256,), torch.int64)},
    ),
}
IDLE = r"transformer_blocks\.59\.(attn\.to_add_out|txt_mlp)\."  # Qwen-Image writes no text after its last block


class Rows:
    """What training asks of a latent cache, all zeros."""

    def __init__(self, size: Size, count: int = 64) -> None:
        self.size, cells = size, size.side // size.factor
        self.rows, self.spans, self.shapes = range(count), [range(count)], [(size.channels, cells, cells)]
        self.null = {} if families.get(size.family).picture_tokens else self.condition(1)

    def __len__(self) -> int:
        return len(self.spans[0])

    def condition(self, count):
        return {key: torch.zeros(count, *shape, dtype=kind) for key, (shape, kind) in self.size.text.items()}

    def batch(self, indices):
        return torch.zeros(len(indices), *self.shapes[0]), self.condition(len(indices))


@pytest.fixture
def device(monkeypatch):
    """A device without memory; nothing of it stays in the tables that are sent once."""
    ddpm._times_on.cache_clear()
    with pretend_device.ready() as name, pretend_device.without_memory():
        monkeypatch.setattr(pipelines, "device", lambda: name)
        yield name
    ddpm._times_on.cache_clear()


def pytest_generate_tests(metafunc):
    every, name = metafunc.config.getoption("--every"), metafunc.function.__name__
    metafunc.parametrize("task", [size for size in SIZES if every or name in OFTEN.get(size, ())], indirect=True)


@pytest.fixture
def task(request, device):
    """The training of one model: converted, in bfloat16, on the device."""
    size = SIZES[request.param]
    family = families.get(size.family)
    config = read_json(catalog.CONFIGS / f"{request.param}.json")
    model = build(family.convert_config(config, size.factor, size.channels, size.side))
    nn.Module.to(model, torch.bfloat16).to(device)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(size.billions * 1e9, rel=0.02)
    kind = "guidance-corrected" if family.guidance == "embedded" else "flow"
    branch = "teacher" if kind == "guidance-corrected" else "student"
    phase = dict(resolution=size.side, steps=1)
    adapt = Adapt.model_validate(dict(objective=kind, null_branch=branch, text_drop=0.5, phases=[phase]))
    scheduler = {"use_dynamic_shifting": False, "shift": 3.0}
    return phases.Task(model, family, adapt, Rows(size), scheduler)


def batch_of(task):
    z0, text = task.rows.batch(range(BATCH))
    drawn = objective.draw(0, 0, range(BATCH), z0.shape[1:], task.sampling(z0.shape[1:]))
    return z0, text, drawn


@pytest.fixture
def little_memory():
    """The host takes under 1 GiB more: the smallest of the models would take 1.4."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@torch.no_grad()
def test_features_of_the_head(task, device, tmp_path, little_memory):
    """A batch enters the sums of the least squares: features in float32, sums in float64."""
    recipe = SimpleNamespace(
        adapt=task.adapt, seed=0, latents=SimpleNamespace(batch=BATCH), align_head=SimpleNamespace(draws=1)
    )
    ranks = SimpleNamespace(rank=0, world=1)
    job = SimpleNamespace(family=task.family, recipe=recipe, crew=ranks, console=NULL)
    fit = HeadFit(job, task, task.rows, tmp_path)
    equations = NormalEquations(fit.inputs, task.rows.shapes[0][0], device)
    with fit.listening():
        rows = fit._rows(*objective.to_device(batch_of(task), device))
    equations.add(*rows)
    channels, height, width = task.rows.shapes[0]
    assert [tuple(part.shape) for part in rows] == [
        (BATCH, height * width, fit.inputs),
        (BATCH, height * width, channels),
        (BATCH, height * width),
    ]
    found = vars(equations).values()
    assert {(part.device.type, part.dtype) for part in found} == {(device, torch.float64)}
    assert {(part.device.type, part.dtype) for part in rows} == {(device, torch.float32)}


@torch.no_grad()
def test_a_step_of_the_grids_sampler(task, device, little_memory):
    z0, text, _ = objective.to_device(batch_of(task), device)
    null = objective.drop_text(text, task.rows.null, torch.ones(BATCH, dtype=torch.bool, device=device))
    levels = grid.noise_levels(task.family, 1, z0.shape[2] * z0.shape[3], task.scheduler)

    def velocity(*at):
        return objective.velocity(task.family, task.model, *at)

    combine = task.family.guided if task.family.guidance == "cfg" else None
    drawn = grid.sample(velocity, z0, levels, text, null, 4.5, combine)
    assert (drawn.shape, drawn.dtype, drawn.device.type) == (z0.shape, torch.float32, device)


def test_loss_and_gradients_of_a_lora_step(task, device, little_memory):
    """The loss of a phase is one float32 number, and everything that trains gets a gradient of its shape and type."""
    model, family = task.model, task.family
    with without_memory():
        paths = lora.add_lora(model, family.lora_targets, RANK, float(RANK), 0)
    nn.Module.to(model, device, torch.bfloat16)  # as the engine does
    named = dict(lora.trainable(model, task.modules))
    for parameter in named.values():
        parameter.requires_grad_()
    assert len(paths) == sum("lora_A" in name for name in named)
    loss = task.loss()(*objective.to_device(batch_of(task), device))
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, device)
    loss.backward()
    for name, parameter in named.items():
        found = parameter.grad
        if re.match(IDLE, name) and family.model_class.startswith("QwenImage"):
            assert found is None
            continue
        assert found is not None, name
        assert (found.shape, found.dtype, found.device.type) == (parameter.shape, torch.bfloat16, device), name
