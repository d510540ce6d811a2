"""Time per step of the engine against a plain PyTorch loop, on a FLUX of tiny-flux's size with LoRA on its linears.

    python tests/benchmarks/train_overhead.py [steps]

One thread, and the loops take turns step by step. The figure is the ratio of the medians of processor time, which a
busy machine disturbs less than the wall clock; the wall clock stands beside it.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from diffusers import FluxTransformer2DModel

from dcgen_convert import families
from dcgen_convert.train import lora
from dcgen_convert.train.engine import Engine
from dcgen_convert.train.objective import Sampling, draw, flow_loss
from dcgen_convert.train.settings import EngineSettings

FLUX = families.get("flux")
BATCH, CHANNELS, SIDE, RANK = 64, 32, 4, 32
STAGES = (0, 1, 2, 3)


def model_and_parameters():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    lora.add_lora(model, FLUX.lora_targets, RANK, RANK, seed=0)
    named = lora.trainable(model, ["x_embedder", "proj_out"])
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for _, p in named))
    return model, named


def batch():
    generator = torch.Generator().manual_seed(0)
    text = {
        "encoder_hidden_states": torch.randn(BATCH, 16, 128, generator=generator),
        "pooled_projections": torch.randn(BATCH, 128, generator=generator),
    }
    shape = (CHANNELS, SIDE, SIDE)
    draws = draw(0, 0, range(BATCH), shape, Sampling("logit-normal", 1.0, (1.0, 5.0), 0.1))
    return torch.randn(BATCH, *shape, generator=generator), text, draws, {k: v[:1] for k, v in text.items()}


def plain_step(parts):
    model, named = model_and_parameters()
    parameters = [p for _, p in named]
    adam = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    average = [p.detach().clone() for p in parameters]

    def step():
        loss = flow_loss(FLUX, model, *parts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 0.001)
        return loss.item()

    return step


def engine_step(parts, stage: int):
    model, named = model_and_parameters()
    settings = EngineSettings(
        steps=10_000,
        lr=1e-3,
        warmup=0,
        schedule="constant",
        batch=BATCH,
        micro_batch=BATCH,
        dtype="fp32",
        zero=stage,
        offload="none",
        clip=1.0,
        ema=0.999,
        checkpointing=False,
    )
    engine = Engine(model, named, settings)
    return lambda: engine.step(lambda batch: flow_loss(FLUX, model, *batch), [parts]).loss


def main(steps: int) -> None:
    torch.set_num_threads(1)
    parts = batch()
    loops = {"plain": plain_step(parts), **{f"ZeRO {stage}": engine_step(parts, stage) for stage in STAGES}}
    seconds, walls = {name: [] for name in loops}, {name: [] for name in loops}
    for number in range(steps + 3):
        for name, step in loops.items():
            start, wall = time.process_time(), time.perf_counter()
            step()
            if number >= 3:
                seconds[name].append(time.process_time() - start)
                walls[name].append(time.perf_counter() - wall)
    plain = statistics.median(seconds["plain"])
    for name, values in seconds.items():
        median, wall = statistics.median(values), statistics.median(walls[name])
        print(f"{name:8} {median * 1e3:7.1f} ms of processor ({median / plain - 1:+.1%}), {wall * 1e3:7.1f} ms of wall")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
