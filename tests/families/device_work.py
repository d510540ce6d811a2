"""The kinds of work that a conversion gives a device, each on one tiny family, with real arithmetic.

A kind is a function (bench, device) -> tensors on the CPU. Its result must not depend on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from bundle.conftest import autoencoder_dc
from PIL import Image
from torch import Tensor

from dcgen_convert.checkpoint.open import load_source
from dcgen_convert.core.console import NULL
from dcgen_convert.core.journal import Run, Stage
from dcgen_convert.data.cache import LatentCache, write_captions, write_index, write_shard
from dcgen_convert.families.base import Network, reference_keys
from dcgen_convert.networks import autoencoders, models, pipelines
from dcgen_convert.recipe.schema import Recipe
from dcgen_convert.stages import align_head, gap, grid, surgery
from dcgen_convert.stages.head_fit import HeadFit
from dcgen_convert.stages.job import Autoencoder, Job
from dcgen_convert.svdquant.quantize import quantize
from dcgen_convert.svdquant.runtime import emulate, load_dequantised
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.targets import plan_targets
from dcgen_convert.train import lora, objective, phases, watch
from dcgen_convert.train.gradient_start import Gradients
from dcgen_convert.train.prefetch import pinned
from dcgen_convert.train.ridge import NormalEquations

from .tiny_entry import Tiny
from .tiny_models import TINY
from .tiny_parts import alive, encoded, reference_pixels
from .tiny_videos import VIDEOS, video_vae

FACTOR, CHANNELS, ROWS = 32, 32, 8
GUIDANCE, SEED, STEPS = 2.5, 3, 2


@dataclass
class Bench:
    """A family's tiny source, converted, with rows in both latent spaces.

    Attributes:
        work: an empty folder for what a kind of work writes.
    """

    entry: Tiny
    job: Job
    folder: Path
    side: int

    @property
    def name(self) -> str:
        return self.job.recipe.name

    @property
    def family(self):
        return self.job.family

    @property
    def converted(self) -> Path:
        return self.folder / models.TRANSFORMER

    @property
    def rows(self) -> LatentCache:
        return LatentCache(self.folder / "latents", self.side)

    @property
    def work(self) -> Path:
        folder = self.folder / f"work-{len(list(self.folder.glob('work-*')))}"
        folder.mkdir()
        return folder

    def model(self, device: str) -> Network:
        return models.load(self.converted, torch.float32, device=device)

    def task(self, model: Network, **changes: Any) -> phases.Task:
        rows = self.rows.split()[0]
        return phases.Task(model, self.family, self.job.recipe.adapt, rows, self.job.scheduler, **changes)

    def batch(self, task: phases.Task, step: int = 0) -> tuple[Tensor, dict[str, Tensor], objective.Draws]:
        """A micro-batch of two rows on the CPU, as the training reads it."""
        z0, text = task.rows.batch([0, 1])
        return z0, text, objective.draw(SEED, step, [0, 1], z0.shape[1:], task.sampling(z0.shape[1:]))


def bench(name: str, folder: Path) -> Bench:
    """The family ``name`` in ``folder``, on the CPU."""
    entry = {**TINY, **VIDEOS}[name]
    entry.build(folder / "source")
    source = load_source(name, str(folder / "source"))
    family = source.family
    make = autoencoder_dc if family.axes == 2 else video_vae
    make(FACTOR, CHANNELS).save_pretrained(folder / "ae")
    side = entry.deep_side or 2 * FACTOR
    objective_of = "guidance-corrected" if family.guidance == "embedded" else "flow"
    recipe = Recipe.model_validate(
        dict(
            name=name,
            source=str(source.root),
            ae=str(folder / "ae"),
            dtype="fp32",
            latents=dict(batch=2),
            align_head=dict(draws=1),
            adapt=dict(
                objective=objective_of,
                null_branch="teacher" if objective_of == "guidance-corrected" else "student",
                text_drop=0.5,
                phases=[dict(resolution=side, steps=1, rank=2)],
            ),
            bundle=dict(steps=STEPS, guidance=GUIDANCE),
            watch=dict(pictures=2),
        )
    )
    ae = Autoencoder("tiny", folder / "ae", None, FACTOR, CHANNELS)
    job = Job(recipe, None, source, ae, Run(folder / "run", NULL), NULL)
    surgery.run(job, Stage(folder))
    model = models.load(folder / models.TRANSFORMER, torch.float32)
    generator = torch.Generator().manual_seed(5)
    for module in (family.embedder, family.head):
        for value in model.get_submodule(module).parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder / models.TRANSFORMER)
    found = Bench(entry, job, folder, side)
    _write_rows(found)
    return found


def _write_rows(bench: Bench) -> None:
    """Random latents of both autoencoders, and the conditions of real captions."""
    source, entry, folder = bench.job.source, bench.entry, bench.folder / "latents"
    folder.mkdir()
    generator = torch.Generator().manual_seed(9)
    cells, fine = bench.side // FACTOR, bench.side // entry.factor
    if "class_labels" in bench.family.text_keys:
        fine = source.config["sample_size"]  # its position table fits one size
    base = autoencoders.load(source.vae).channels
    times = (2,) * (bench.family.axes == 3)  # latent frames
    for table, shape in (("target", (CHANNELS, *times, cells, cells)), ("base", (base, *times, fine, fine))):
        names = ["z", *reference_keys(len(entry.references))]
        rows = {name: torch.randn(ROWS, *shape, generator=generator) for name in names}
        write_shard(folder, f"{table}-{bench.side}", 0, rows)
    encoders = pipelines.load_text_encoders(source, torch.float32)
    captions = [entry.prompt] * ROWS
    null = {} if bench.family.picture_tokens else encoded(entry, bench.family, encoders, [""])
    write_shard(folder, "text", 0, encoded(entry, bench.family, encoders, captions))
    write_shard(folder, "null", 0, null)
    write_captions(folder, captions)
    write_index(folder, ROWS, ROWS, [2, 5])


def text(bench: Bench, device: str) -> list[Tensor]:
    encoders = pipelines.load_text_encoders(bench.job.source, torch.float32)
    return list(encoded(bench.entry, bench.family, encoders, [bench.entry.prompt, ""]).values())


def draw(bench: Bench, device: str) -> list[Tensor]:
    pipeline, entry = pipelines.load_pipeline(bench.job.source, torch.float32), bench.entry
    settings = dict(side=entry.side, steps=STEPS, guidance=GUIDANCE, length=entry.length)
    given = reference_pixels(entry.references)
    settings |= {"references": [given] if given else (), "frames": entry.frames}
    return [pipelines.draw(bench.family, pipeline, [entry.prompt], [SEED], **settings)]


def autoencoding(bench: Bench, device: str) -> list[Tensor]:
    times = (bench.entry.frames,) * (bench.family.axes == 3)
    pixels = torch.rand(2, 3, *times, 64, 64, generator=torch.Generator().manual_seed(SEED)) * 2 - 1
    found = []
    for folder in (bench.job.source.vae, bench.job.ae.folder):
        codec = autoencoders.load(folder, device=device)
        latents = codec.encode(pixels)
        found += [latents, codec.decode(latents)]
    return found


def held_out(bench: Bench, device: str) -> list[Tensor]:
    task = bench.task(bench.model(device))
    return [torch.tensor(align_head.heldout_loss(bench.job, task, bench.rows.split()[1]))]


@torch.no_grad()
def head_fit(bench: Bench, device: str) -> list[Tensor]:
    task = bench.task(bench.model(device))
    fit = HeadFit(bench.job, task, bench.rows.split()[1], bench.work)
    equations = NormalEquations(fit.inputs, CHANNELS, device)
    with fit.listening():
        for part in fit.parts:
            for unit in part[:2]:
                fit.add(equations, unit)
    solution = equations.solve(1e-2, bias=fit.head.bias is not None)
    return [*equations.tensors().values(), *(part.cpu() for part in solution)]


def gaps(bench: Bench, device: str) -> list[Tensor]:
    return [torch.tensor(gap.measure(bench.job, bench.converted, bench.rows, bench.work))]


def picture_grid(bench: Bench, device: str) -> list[Tensor]:
    model, folder = bench.model(device), bench.work
    grid.drawing(bench.job, bench.rows, folder)(lambda *at: objective.velocity(bench.family, model, *at), 1)
    with Image.open(watch.sheet_of(folder, 1)) as picture:
        return [torch.from_numpy(np.array(picture)).float() / 255]


def lora_step(bench: Bench, device: str, consistency: float = 0.0) -> list[Tensor]:
    """The step of a phase without DeepSpeed's engine: loss, gradients, the weights after AdamW."""
    model = bench.model(device)
    task = bench.task(model, consistency=consistency)
    lora.add_lora(model, bench.family.lora_targets, 2, 2.0, SEED)
    named = lora.trainable(model, task.modules)
    trained = [parameter.requires_grad_() for _, parameter in named]
    loss_of, optimizer = task.loss(), torch.optim.AdamW(trained, lr=1e-3, eps=1e-3)
    losses = []
    for step in range(2):  # LoRA's A has a gradient from the second step on
        optimizer.zero_grad()
        loss = loss_of(*objective.to_device(bench.batch(task, step), device))
        loss.backward()
        losses.append(loss.detach().cpu())
        if step == 0:
            optimizer.step()
    last = bench.family.block_modules(model)[-1]  # some give what it makes of the text to nobody
    unread = {id(parameter) for parameter in last.parameters()}
    missing = [name for name, p in named if p.grad is None and id(p) not in unread]
    assert not missing, missing
    return [*losses, *(p.grad.cpu() for p in trained if p.grad is not None), *(p.detach().cpu() for p in trained)]


def lora_start(bench: Bench, device: str) -> list[Tensor]:
    """The gradients that LoRA begins along, of two micro-batches."""
    model = bench.model(device)
    task, paths = bench.task(model), lora.targeted(model, bench.family.lora_targets)
    trained = {id(parameter) for _, parameter in lora.trainable(model, task.modules)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    gradients, loss_of = Gradients.of(model, paths), task.loss()
    with gradients.listening():
        for step in range(2):
            loss_of(*objective.to_device(bench.batch(task, step), device)).backward()
    return [gradients.sums[path].cpu() for path in paths if path in gradients.sums]


def consistency(bench: Bench, device: str) -> list[Tensor]:
    return lora_step(bench, device, consistency=0.5)


def quantisation(bench: Bench, device: str, precision: str) -> list[Tensor]:
    """Calibrated and quantised on ``device``; what both runtimes predict there, and the dense model."""
    family, entry, job, folder = bench.family, bench.entry, bench.job, bench.work
    config = family.convert_config(job.source.config | (entry.wide or {}), FACTOR, CHANNELS, bench.side)
    torch.manual_seed(2)
    dense = alive(getattr(diffusers, family.model_class).from_config(config)).requires_grad_(False)
    dense.save_pretrained(folder / "dense")
    text, calls = bench.rows.batch([0])[1], []
    z, once = torch.randn(1, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(SEED)), torch.ones(1)
    handle = dense.register_forward_pre_hook(lambda _, args, given: calls.append((args, given)), with_kwargs=True)
    with torch.no_grad():
        wanted = family.predict(dense, z, 0.6 * once, text, once)
    handle.remove()
    calls = [bind(dense, *call) for call in calls]
    settings = QuantSettings(rank=16, precision=precision, device=device)
    quantize(folder / "dense", folder / "4-bit", plan_targets(family, config, None), settings, calls, NULL)
    found = [wanted]
    for load in (load_dequantised, emulate):
        model = load(folder / "4-bit", torch.float32).to(device)
        with torch.no_grad():
            there = [value.to(device) for value in (z, 0.6 * once, once)]
            words = {key: value.to(device) for key, value in text.items()}
            found.append(family.predict(model, there[0], there[1], words, there[2]).cpu())
    return found


def bind(model: Network, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


WORK: dict[str, Callable[[Bench, str], list[Tensor]]] = {
    "text": text,
    "draw": draw,
    "autoencoders": autoencoding,
    "held-out": held_out,
    "head": head_fit,
    "gap": gaps,
    "grid": picture_grid,
    "lora": lora_step,
    "lora start": lora_start,
    "consistency": consistency,
    "nvfp4": partial(quantisation, precision="nvfp4"),
    "int4": partial(quantisation, precision="int4"),
}


FOUR_BITS = ("nvfp4", "int4")


Once = Callable[[], object]  # does one time what a stage does again and again, with everything else in place


def micro_step(bench: Bench, device: str) -> Once:
    """Of a phase: loss and backward pass of one micro-batch, which the reading thread has pinned."""
    model = bench.model(device)
    task = bench.task(model)
    lora.add_lora(model, bench.family.lora_targets, 2, 2.0, SEED, start={})  # with the frozen LoRA beside it
    for _, parameter in lora.trainable(model, task.modules):
        parameter.requires_grad_()
    loss_of, batch = task.loss(), pinned(bench.batch(task))
    return lambda: loss_of(*objective.to_device(batch, device)).backward()


@torch.no_grad()
def drawing_step(bench: Bench, device: str) -> Once:
    """Of the grid: one step of the sampler, with both passes of a guided family."""
    model, (z0, text) = bench.model(device), bench.rows.batch([0, 1])
    z, *words = (value.to(device) for value in (z0, *text.values()))
    text = dict(zip(text, words, strict=True))
    null = objective.drop_text(text, bench.rows.null, torch.ones(2, dtype=torch.bool, device=device))
    levels, family = torch.tensor([1.0, 0.5], device=device), bench.family
    combine = family.guided if family.guidance == "cfg" else None

    def velocity(*at: Any) -> Tensor:
        return objective.velocity(bench.family, model, *at)

    return torch.no_grad()(lambda: grid.sample(velocity, z, levels, text, null, GUIDANCE, combine))


def head_batch(bench: Bench, device: str) -> Once:
    """Of the head's least squares: the sums of one batch."""
    fit = HeadFit(bench.job, bench.task(bench.model(device)), bench.rows.split()[1], bench.work)
    equations = NormalEquations(fit.inputs, CHANNELS, device)
    unit = replace(fit.parts[1][0], rows=[0, 1])

    @torch.no_grad()
    def once() -> None:
        with fit.listening():
            fit.add(equations, unit)

    return once


def held_out_batch(bench: Bench, device: str) -> Once:
    """One held-out batch at every quantile of t."""
    task, rows = bench.task(bench.model(device)), bench.rows.split()[1]
    loss_of, batches = task.loss(), [([0, 1], *rows.batch([0, 1]))]
    return lambda: objective.evaluate_loss(loss_of, batches, SEED, task.sampling, device)


def encoded_batch(bench: Bench, device: str) -> Once:
    """Latents of two pictures in the deep autoencoder."""
    codec = autoencoders.load(bench.job.ae.folder, device=device)
    pixels = torch.zeros(2, 3, *(5,) * (bench.family.axes == 3), 64, 64)
    return lambda: codec.encode(pixels)


REPEATED: dict[str, Callable[[Bench, str], Once]] = {
    "micro-step": micro_step,
    "drawing step": drawing_step,
    "head batch": head_batch,
    "held-out batch": held_out_batch,
    "encoded batch": encoded_batch,
}
