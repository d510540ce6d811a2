"""What a machine with a GPU can do, in at most ten minutes: whether every stage runs there, and how fast.

    python tests/benchmarks/on_a_gpu.py OUT.json             # one GPU, about 60 GB of its memory for FLUX
    python tests/benchmarks/on_a_gpu.py OUT.json --small     # the same parts at tiny sizes, on a CPU too

Models of the published sizes get random weights on the device itself, so nothing is downloaded. Parts that cannot begin
before the time is over are named as left out. A part that fails is reported, and the others go on.

OUT.json has `rates`: units per second by the kinds of `planning/rates.py`, beside what is assumed there. The exit code
is 1 when a part failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcgen_convert import families
from dcgen_convert.core.files import read_json, sha256
from dcgen_convert.data.images import read_pixels, to_image
from dcgen_convert.families import catalog
from dcgen_convert.families.deep_autoencoders import config_of
from dcgen_convert.networks.autoencoders import Codec
from dcgen_convert.networks.pipelines import device as the_device
from dcgen_convert.planning import memory, rates
from dcgen_convert.planning.arithmetic import forward_flops, side_passes, train_flops
from dcgen_convert.planning.bill import DECODE, ENCODE, ROUNDINGS, layer_flops
from dcgen_convert.planning.structures import structure
from dcgen_convert.recipe.schema import Adapt
from dcgen_convert.svdquant import gptq
from dcgen_convert.svdquant.layer import quantize_linears
from dcgen_convert.svdquant.settings import QuantSettings
from dcgen_convert.svdquant.skeleton import build
from dcgen_convert.svdquant.stats import Gatherer
from dcgen_convert.svdquant.weights import group_scales, tensor_scale
from dcgen_convert.train import lora, objective, phases
from dcgen_convert.train.engine import Engine
from dcgen_convert.train.meter import peak_flops
from dcgen_convert.train.settings import EngineSettings

TINY = ["tiny-flux", "--ae", "tiny-dc-ae-f32", "--quantize", "nvfp4", "-y", "--json"]
SHORT = ["data.count=64", "data.steps=2", "align_head.draws=1", "align_head.steps=4", "adapt.phases.0.steps=4"]
SHORT += ["bundle.steps=4", "evaluate.prompts=2", "latents.scale_tolerance=0.9", "adapt.phases.0.batch=8"]
SHORT += ["quantize.calibration.prompts=2", "quantize.calibration.steps=2"]
LAYOUTS = (("2", "none"), ("2", "optimizer"), ("3", "none"), ("3", "all"))
SAME = 0.02  # relative: losses of layouts, in bfloat16
SMALL = {  # changes of a config
    "flux-dev": dict(num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=64),
    "sana-1.6b": dict(
        num_layers=1, num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=32,
        cross_attention_dim=64, caption_channels=64,
    ),
}  # fmt: skip


@dataclass
class Check:
    """One run of the script.

    Attributes:
        rates: kind -> units per second. parts: name -> what was measured.
    """

    small: bool
    ends: float
    folder: Path
    device: str = field(default_factory=the_device)
    rates: dict[str, float] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()

    def run(self, name: str, part: Callable[[Check], dict[str, Any]], seconds: float) -> None:
        """Run a part that takes up to about ``seconds``, and say what came of it."""
        if not self.small and self.left < seconds:
            self.parts[name] = {"left_out": f"{self.left:.0f} s are left, it takes up to {seconds:.0f} s"}
        else:
            begun = time.monotonic()
            try:
                found = part(self)
            except Exception as error:  # noqa: BLE001  the other parts are worth running
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
                self.failed.append(name)
            self.parts[name] = {**found, "part_seconds": round(time.monotonic() - begun, 1)}
        print(name, json.dumps(self.parts[name]), file=sys.stderr, flush=True)
        free()


def free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(work: Callable[[], object], times: int = 1, warm: int = 1) -> float:
    """Seconds of one ``work``, its device waited for, after ``warm`` rounds that are not counted."""
    for _ in range(warm):
        work()
    wait()
    begun = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - begun) / times


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def host(check: Check) -> dict[str, Any]:
    """Files, hashes, PNG, starts."""
    size, path = (2**23 if check.small else 2**30), check.folder / "bytes"
    block = os.urandom(2**20)

    def write_and_read() -> None:
        with open(path, "wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read from the disk
        with open(path, "rb") as file:
            while file.read(2**24):
                pass

    check.rates["disk"] = 2 * size / seconds_of(write_and_read, warm=0)
    check.rates["hash"] = size / seconds_of(lambda: sha256(path), warm=0)
    path.unlink()
    side = 64 if check.small else 1024
    pixels = torch.rand(3, side, side) * 2 - 1
    png = check.folder / "picture.png"
    check.rates["pixels"] = side**2 / seconds_of(lambda: to_image(pixels).save(png, compress_level=1), times=3)
    with ThreadPoolExecutor(8) as threads:  # as data.ahead reads
        read = seconds_of(lambda: list(threads.map(lambda _: read_pixels(png, side), range(16))), times=1)
    check.rates["decoding"] = 16 * side**2 / read
    libraries = "import torch, diffusers, transformers, deepspeed, peft"
    start = seconds_of(
        lambda: subprocess.run([sys.executable, "-c", libraries], check=True, stdout=subprocess.DEVNULL), warm=0
    )
    check.rates["starts"] = 1 / start
    return {"cores": os.cpu_count()}


def solvers(check: Check) -> dict[str, Any]:
    """One linear of FLUX through SVDQuant, and its rounding alone."""
    width, tokens, rank = (128, 256, 16) if check.small else (3072, 4096, 32)
    weight = torch.randn(width, width, device=check.device) / math.sqrt(width)
    gatherer = Gatherer("x", width, 1, 0, check.device)
    gatherer.add(torch.randn(tokens, width, device=check.device), 0)
    settings = QuantSettings(rank=rank, device=check.device)

    def layer() -> None:
        given = gatherer.stats(readers=2)  # so that the sums stay for the next round
        quantize_linears(["x"], [weight], [None], given, settings, torch.Generator().manual_seed(0))

    whole = seconds_of(layer)
    scale = tensor_scale(weight, "nvfp4")
    micro = group_scales(weight, "nvfp4", scale)
    lower = gptq.factor(gptq.shrink(gatherer.total / gatherer.count, gatherer.count))
    assert lower is not None, "damped Hessians have a factor"
    rounding = seconds_of(lambda: gptq.gptq(weight, lower, micro, scale, "nvfp4"))
    check.rates["columns"] = width / rounding
    rest = max(whole - ROUNDINGS * rounding, 0.1 * whole)  # refits that do not help are left out
    check.rates["float32"] = layer_flops(width, width, rank) / rest
    return {"linear": [width, width], "seconds": round(whole, 3), "rounding_seconds": round(rounding, 3)}


def autoencoder(check: Check) -> dict[str, Any]:
    """A DC-AE f32 of the published size, float32: encoding and decoding of one picture."""
    entry = catalog.find_autoencoder("dc-ae-f32")
    assert entry is not None, "it is in the catalogue"
    config = config_of(entry)
    if check.small:
        widths = [8, 8, 16, 16, 32, 32]
        config |= {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
        config |= {"attention_head_dim": 8}
    model = filled(config, torch.float32, check.device)
    codec = Codec(model, entry.factor, entry.channels, 1.0)
    side, count = (64, 1) if check.small else (1024, 4)
    pixels = torch.rand(count, 3, side, side) * 2 - 1
    latents = codec.encode(pixels)
    encode, decode = (seconds_of(lambda: codec.encode(pixels)), seconds_of(lambda: codec.decode(latents)))
    area = count * side**2
    check.rates["convolution"] = area * (ENCODE + DECODE) / (encode + decode)
    rate = {"encoded_pixels_per_second": round(area / encode), "decoded_pixels_per_second": round(area / decode)}
    return {**rate, "pictures": count, "side": side, "peak_gib": peak_gib()}


def filled(config: dict[str, Any], dtype: torch.dtype, device: str) -> nn.Module:
    """The model of a config with random weights that are made on the device."""
    model = nn.Module.to(build(config), dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            matrix = parameter.dim() > 1
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            spread = 1 / math.sqrt(parameter[0].numel()) if matrix else 0.0
            value = value.normal_(0, spread) if matrix else value.fill_(float(name != "bias"))
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return nn.Module.to(model, device)  # its buffers


@dataclass(frozen=True)
class Rows:
    """Random latents and conditions in place of a latent cache. text: shape and type of one condition by keyword."""

    shape: tuple[int, int, int]
    text: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def null(self) -> dict[str, torch.Tensor]:
        return self.condition(1)

    @property
    def spans(self) -> list[range]:
        return [range(64)]

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        return [self.shape]

    def __len__(self) -> int:
        return 64

    def condition(self, count: int) -> dict[str, torch.Tensor]:
        return {key: torch.ones(count, *shape, dtype=kind) for key, (shape, kind) in self.text.items()}

    def batch(self, indices: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.randn(len(indices), *self.shape), self.condition(len(indices))


def training(name: str, batch: int) -> Callable[[Check], dict[str, Any]]:
    """LoRA steps of a published model on f32 latents of 1024 px, through the engine."""

    def part(check: Check) -> dict[str, Any]:
        config = read_json(catalog.CONFIGS / f"{name}.json") | (SMALL[name] if check.small else {})
        family = families.recognise(config)
        side, rank = (128, 4) if check.small else (1024, 64)
        model = filled(family.convert_config(config, 32, 32, side), torch.bfloat16, check.device)
        words, width = (8 if check.small else family.text_length), family.text_width(config)
        text = {"encoder_hidden_states": ((words, width), torch.bfloat16)}
        if "pooled_projections" in family.text_keys:
            text["pooled_projections"] = ((config["pooled_projection_dim"],), torch.bfloat16)
        else:
            text["encoder_attention_mask"] = ((words,), torch.int64)
        kind = "guidance-corrected" if family.guidance == "embedded" else "flow"
        adapt = Adapt.model_validate(dict(objective=kind, phases=[dict(resolution=side, steps=3)]))
        rows = Rows((32, side // 32, side // 32), text)
        task = phases.Task(model, family, adapt, rows, {"shift": 3.0})
        lora.add_lora(model, family.lora_targets, rank, float(rank), 0)
        return {"model": name, **_steps(check, task, batch, words)}

    return part


def _steps(check: Check, task: phases.Task, batch: int, words: int) -> dict[str, Any]:
    settings = EngineSettings(
        steps=4, lr=1e-4, warmup=0, schedule="constant", batch=batch, micro_batch=batch, dtype="bf16", zero=2,
        offload="none", clip=0.1, ema=0.0, checkpointing=True,
    )  # fmt: skip
    named, loss_of = lora.trainable(task.model, task.modules), task.loss()
    engine = Engine(task.model, named, settings)
    try:

        def step() -> None:
            z0, text = task.rows.batch(range(batch))
            drawn = objective.draw(0, 0, range(batch), z0.shape[1:], task.sampling(z0.shape[1:]))
            losses.append(engine.step(lambda at: loss_of(*objective.to_device(at, engine.device)), [(z0, text, drawn)]))

        losses: list[Any] = []
        seconds = seconds_of(step, times=2)
    finally:
        engine.close()
    shape, config = task.rows.shapes[0], {**task.model.config, "_class_name": type(task.model).__name__}
    tokens, passes = shape[1] * shape[2], side_passes(task.adapt)
    once = forward_flops(structure(config), tokens, words)
    done = [
        batch * train_flops(once, full=False, checkpointing=kept, passes=passes) / seconds for kept in (True, False)
    ]
    check.rates["matmul"] = done[0]  # the largest model comes last, and counts
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    trained = sum(parameter.numel() for _, parameter in named)
    frozen = sum(parameter.numel() for parameter in task.model.parameters()) - trained
    sample = memory.activations(tokens + words, structure(config).width, structure(config).blocks, True)
    planned = memory.estimate(memory.Training(frozen, trained, sample, 2, False), 1, 2, "none", batch)
    return {
        "seconds_per_sample": round(seconds / batch, 4),
        "mfu": round(done[1] / peak, 3) if peak else None,
        "peak_gib": peak_gib(),
        "planned_gib": round(planned.total / 2**30, 2),
        "loss": round(losses[-1].loss, 4),
    }


def convert(check: Check, run: Path, *more: str) -> dict[str, Any]:
    """`convert` of the miniature in ``run``; its result document."""
    short = [part for setting in SHORT for part in ("--set", setting)]
    arguments = [*TINY, "-o", str(run / "bundle"), "--run-dir", str(run / "run"), *short, *more]
    limit = max(60.0, check.left)
    found = subprocess.run(
        [sys.executable, "-m", "dcgen_convert.cli", *arguments], capture_output=True, text=True, timeout=limit
    )
    if found.returncode:
        raise RuntimeError(f"exit {found.returncode}: {found.stderr[-600:]}")
    return json.loads(found.stdout)


def tiny_line(check: Check) -> dict[str, Any]:
    """A whole conversion to a verified NVFP4 bundle."""
    found = convert(check, check.folder / "tiny", *(["--set", "data.count=32"] if check.small else []))
    return {"status": found["status"], "stages": {stage["name"]: stage["seconds"] for stage in found["stages"]}}


def layouts(check: Check) -> dict[str, Any]:
    """The first phase again with every layout: the same losses."""
    losses, found = [], {}
    for zero, offload in LAYOUTS[:1] if check.small else LAYOUTS:
        folder = check.folder / f"zero-{zero}-{offload}"
        shutil.copytree(check.folder / "tiny", folder)
        chosen = ["--set", f"adapt.zero={zero}", "--set", f"adapt.offload={offload}"]
        few = ["--set", "data.count=32"] if check.small else []
        stages = convert(check, folder, *chosen, *few, "--from", "adapt-1", "--until", "adapt-1")["stages"]
        losses.append(stages[-1]["metrics"]["loss_last"])
        found[f"ZeRO {zero}, offload {offload}"] = losses[-1]
    if max(losses) - min(losses) > SAME * losses[0]:
        raise RuntimeError(f"the losses differ: {found}")
    return found


def report(check: Check) -> dict[str, Any]:
    """What was measured, beside what `plan` assumes of the device that it takes this one for."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    assumed = (rates.H100 if gpu else rates.CPUS).rates
    beside = {
        kind: {"measured": float(f"{value:.4g}"), **assumed[kind]._asdict()} for kind, value in check.rates.items()
    }
    return {
        "device": gpu or "cpu",
        "small": check.small,
        "torch": torch.__version__,
        "rates": {kind: float(f"{value:.4g}") for kind, value in check.rates.items()},
        "assumed": beside,
        "parts": check.parts,
        "failed": check.failed,
    }


PARTS: list[tuple[str, Callable[[Check], dict[str, Any]], float]] = [
    ("host", host, 60),
    ("tiny line", tiny_line, 150),
    ("autoencoder", autoencoder, 30),
    ("solvers", solvers, 30),
    ("sana-1.6b", training("sana-1.6b", 16), 40),
    ("flux-dev", training("flux-dev", 4), 60),
    ("layouts", layouts, 120),
]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("output", type=Path, help="the JSON file to write")
    arguments.add_argument("--small", action="store_true", help="tiny sizes")
    arguments.add_argument("--minutes", type=float, default=10.0, help="no part begins that would take longer")
    arguments.add_argument("--only", nargs="*", choices=[name for name, _, _ in PARTS], help="these parts")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check = Check(given.small, time.monotonic() + 60 * given.minutes, Path(folder))
        for name, part, seconds in PARTS:
            if not given.only or name in given.only:
                check.run(name, part, seconds)
    given.output.write_text(json.dumps(report(check), indent=2) + "\n")
    return int(bool(check.failed))


if __name__ == "__main__":
    sys.exit(main())
